use super::*;
use crate::{
    fixture::{Fixture, at},
    ledger::tests::{entry, record},
};
use casemate_spec::{HostFile, Name, parse_host};
use proptest::prelude::*;
use std::path::Path;

const DRIVES: [&str; 3] = ["0000:10:00.0", "0000:11:00.0", "0000:12:00.0"];
const POOL: &str = "[[pool]]\nname = 'drives'\nid = '8086:0a54'\n";

/// Three drives of one kind, near to nodes 0, 1 and 1.
fn machine() -> Fixture {
    let machine = Fixture::typical();
    for (index, (address, node)) in DRIVES.iter().zip(["0", "1", "1"]).enumerate() {
        let attributes =
            [("class", "0x010802"), ("device", "0x0a54"), ("numa_node", node), ("reset_method", "flr")];
        machine.pci(address, &attributes, None, Some(20 + u32::try_from(index).unwrap()));
    }
    machine
}

fn pools(text: &str) -> HostFile {
    parse_host(Path::new("host.toml"), text).unwrap()
}

/// Chooses `count` of the pool "drives" for tenant acme; tells which, or the refusal's code.
fn choose(machine: &Fixture, text: &str, named: &[&str], count: usize) -> Result<Vec<String>, Refusal> {
    let host = machine.host();
    let functions = host.functions().unwrap();
    let file = pools(text);
    let pooled: Vec<_> =
        (0..count).map(|table| Pooled { pool: Name::new("drives").unwrap(), table }).collect();
    let named: Vec<_> = named.iter().map(|address| at(address)).collect();
    let choice = Choice { tenant: "acme", named: &named, pooled: &pooled };
    let chosen = Pools::new(&host, &functions, &file.pools)?.choose(&machine.ledger(), &choice)?;
    Ok(chosen.into_iter().map(|(_, address)| address.to_string()).collect())
}

fn code(machine: &Fixture, text: &str, named: &[&str], count: usize) -> &'static str {
    choose(machine, text, named, count).unwrap_err().code
}

#[test]
fn devices_near_to_each_other_come_first() {
    let machine = machine();
    assert_eq!(choose(&machine, POOL, &[], 1).unwrap(), [DRIVES[0]]);
    assert_eq!(choose(&machine, POOL, &[], 2).unwrap(), DRIVES[1..], "two of node 1 rather than of both");
    assert_eq!(choose(&machine, POOL, &[], 3).unwrap().len(), 3, "preferred is not required");
    assert_eq!(choose(&machine, POOL, &[DRIVES[2]], 1).unwrap(), [DRIVES[1]], "near to the named one");
    let ignored = format!("{POOL}numa = 'ignored'\n");
    assert_eq!(choose(&machine, &ignored, &[DRIVES[2]], 1).unwrap(), [DRIVES[0]]);
}

#[test]
fn required_means_it() {
    let machine = machine();
    let required = format!("{POOL}numa = 'required'\n");
    assert_eq!(choose(&machine, &required, &[], 2).unwrap(), DRIVES[1..]);
    let refusal = choose(&machine, &required, &[], 3).unwrap_err();
    assert_eq!(refusal.code, "pool-empty");
    assert!(refusal.cause.contains("far from the guest's other devices"), "{refusal}");
}

#[test]
fn what_others_have_is_not_chosen() {
    let machine = machine();
    machine.ledger().update(|book| book.entries.push(entry("db", vec![record(DRIVES[0], 20)]))).unwrap();
    assert_eq!(choose(&machine, POOL, &[], 1).unwrap(), [DRIVES[1]]);
    machine.bind("0000:03:00.0", "nvme");
    let refusal = choose(&machine, POOL, &[], 3).unwrap_err();
    assert!(refusal.cause.contains("0000:10:00.0 device-claimed"), "{refusal}");
    assert_eq!(code(&machine, "[[pool]]\nname = 'drives'\nid = '8086:ffff'\n", &[], 1), "pool-empty");
    assert_eq!(code(&machine, "[[pool]]\nname = 'nics'\nclass = '02'\n", &[], 1), "pool-unknown");
    assert_eq!(choose(&machine, "", &[], 0).unwrap(), [] as [&str; 0]);
}

#[test]
fn unchecked_firmware_stays_with_its_tenant() {
    let machine = machine();
    let ledger = machine.ledger();
    let had = |tenant: &str| {
        let mut device = record(DRIVES[0], 20);
        (device.device, device.state) = (0x0a54, crate::DeviceState::Claimed);
        let entry = entry("web", vec![device]);
        ledger.update(|book| book.entries = vec![entry.clone()]).unwrap();
        ledger.attach(&entry.owner, tenant, &[]).unwrap();
        ledger.update(|book| book.entries.clear()).unwrap();
    };
    had("acme");
    assert_eq!(choose(&machine, POOL, &[], 1).unwrap(), [DRIVES[0]], "the same tenant again");
    had("other");
    assert_eq!(choose(&machine, POOL, &[], 1).unwrap(), [DRIVES[1]]);
    assert_eq!(code(&machine, POOL, &[DRIVES[0]], 0), "device-of-another-tenant", "nor by its address");
    let locked = format!("{POOL}firmware = 'locked'\n");
    assert_eq!(choose(&machine, &locked, &[], 1).unwrap(), [DRIVES[0]]);
    // Another card at the address has had no tenant.
    machine.write(&format!("sys/devices/pci0000:00/{}/device", DRIVES[0]), "0x0a55\n");
    assert_eq!(
        choose(&machine, "[[pool]]\nname='drives'\nvendor='8086'\nclass='0108'\n", &[], 1).unwrap(),
        [DRIVES[0]]
    );
    machine.write(&format!("sys/devices/pci0000:00/{}/device", DRIVES[0]), "0x0a54\n");
    assert_eq!(ledger.pardon(at(DRIVES[0])).unwrap().last_tenant.as_deref(), Some("other"));
    assert_eq!(choose(&machine, POOL, &[], 1).unwrap(), [DRIVES[0]]);
    let nobody = crate::Owner::this_process("nobody").unwrap();
    assert_eq!(ledger.attach(&nobody, "acme", &[]).unwrap_err().code, "ledger-no-entry");
}

#[test]
fn unchecked_firmware_stays_with_its_tenant_also_when_it_was_chosen_before() {
    let machine = machine();
    let ledger = machine.ledger();
    let attach = |tenant: &str, unchecked: &[PciAddress]| {
        let mut device = record(DRIVES[0], 20);
        (device.device, device.state) = (0x0a54, crate::DeviceState::Claimed);
        let entry = entry("web", vec![device]);
        ledger.update(|book| book.entries = vec![entry.clone()]).unwrap();
        ledger.attach(&entry.owner, tenant, unchecked).map_err(|refusal| refusal.code)
    };
    let drive = [at(DRIVES[0])];
    attach("acme", &drive).unwrap();
    assert_eq!(attach("other", &drive), Err("device-of-another-tenant"));
    assert_eq!(attach("other", &[at(DRIVES[1])]), Ok(()), "only what nobody checks");
}

#[test]
fn pools_do_not_overlap() {
    let machine = machine();
    let both = format!("{POOL}[[pool]]\nname = 'fast'\naddresses = ['{}']\n", DRIVES[1]);
    let refusal = choose(&machine, &both, &[], 1).unwrap_err();
    assert_eq!((refusal.code, refusal.subject.as_str()), ("pool-overlap", DRIVES[1]));
    assert_eq!(refusal.location.unwrap().line, 5);

    machine.pci("0000:02:10.0", &[("class", "0x020000"), ("device", "0x10ca")], None, Some(30));
    machine.link("sys/devices/pci0000:00/0000:02:10.0/physfn", "sys/devices/pci0000:00/0000:02:00.0");
    let virtual_ones = "[[pool]]\nname = 'drives'\nid = '8086:10ca'\n";
    assert_eq!(code(&machine, virtual_ones, &[], 1), "pool-empty", "sound, but this one has no reset");
    let with_physical = format!("{virtual_ones}[[pool]]\nname = 'cards'\nid = '8086:10c9'\n");
    assert_eq!(code(&machine, &with_physical, &[], 1), "pool-overlap");
    assert_eq!(code(&machine, "[[pool]]\nname = 'drives'\nclass = '02'\n", &[], 1), "pool-overlap");
}

#[test]
fn strangers_need_a_host_that_holds_them() {
    let machine = machine();
    let trusted = format!("{POOL}trusted = true\n");
    machine.write("sys/kernel/iommu_groups/20/type", "identity\n");
    assert_eq!(choose(&machine, POOL, &[], 1).unwrap(), [DRIVES[1]]);
    assert_eq!(code(&machine, "", &[DRIVES[0]], 0), "host-iommu-passthrough");
    assert_eq!(choose(&machine, &trusted, &[], 1).unwrap(), [DRIVES[0]]);
    machine.write("proc/cmdline", "quiet pcie_acs_override=downstream\n");
    assert_eq!(code(&machine, POOL, &[DRIVES[1]], 0), "host-acs-override");
    assert_eq!(choose(&machine, &trusted, &[DRIVES[1]], 0).unwrap(), [] as [&str; 0]);
}

proptest! {
    // Each case is a machine made of files.
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn what_is_chosen_is_free_in_the_pool_and_near_where_required(
        nodes in prop::collection::vec(-1i32..3, 1..5), count in 1usize..5, required: bool, taken in 0usize..6,
    ) {
        let machine = Fixture::typical();
        for (index, node) in nodes.iter().enumerate() {
            let attributes = [
                ("class", "0x010802"), ("device", "0x0a54"), ("numa_node", &*node.to_string()), ("reset_method", "flr"),
            ];
            machine.pci(&format!("0000:1{index}:00.0"), &attributes, None, Some(20 + u32::try_from(index).unwrap()));
        }
        let taken = format!("0000:1{taken}:00.0");
        machine.ledger().update(|book| book.entries.push(entry("db", vec![record(&taken, 99)]))).unwrap();
        let text = if required { format!("{POOL}numa = 'required'\n") } else { POOL.to_owned() };
        let free: Vec<i32> = (0..).zip(&nodes).filter(|(index, _)| format!("0000:1{index}:00.0") != taken)
            .map(|(_, node)| *node).collect();
        let told: Vec<i32> = free.iter().copied().filter(|node| *node >= 0).collect();
        let most_near = told.iter().map(|node| free.iter().filter(|other| *other == node || **other < 0).count())
            .max().unwrap_or(free.len());
        match choose(&machine, &text, &[], count) {
            Ok(chosen) => {
                prop_assert_eq!(chosen.len(), count);
                prop_assert!(!chosen.contains(&taken));
                let mut distinct = chosen.clone();
                distinct.dedup();
                distinct.sort();
                distinct.dedup();
                prop_assert_eq!(distinct.len(), count);
                prop_assert!(!required || count <= most_near);
            }
            Err(refusal) => {
                prop_assert_eq!(refusal.code, "pool-empty");
                let available = if required { most_near } else { free.len() };
                prop_assert!(count > available);
            }
        }
    }
}
