//! Takes devices from the host, as for a guest, and gives them back.
//!
//! ```text
//! claim_cycle list                        what there is, and what can be given away
//! claim_cycle doctor                      what the host can do
//! claim_cycle cycle DIRECTORY ADDRESS...  claim, make dirty as a guest would, release
//! claim_cycle hold DIRECTORY ADDRESS...   claim, start a stand-in for the guest that holds the device, wait to be killed
//! claim_cycle recover DIRECTORY           undo what killed ones left in the ledger of this directory
//! ```

use std::{
    error::Error,
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use casemate_host::{ClaimRequest, Host, Ledger, Owner, assignable, claim, doctor, recover};
use casemate_spec::PciAddress;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let host = Host::live();
    match words.as_slice() {
        ["list"] => list(&host),
        ["doctor"] => {
            doctor(&host).iter().for_each(|check| println!("{check:?}"));
            Ok(())
        }
        ["cycle", directory, addresses @ ..] => cycle(&host, &Ledger::open(Path::new(directory))?, addresses),
        ["hold", directory, addresses @ ..] => hold(&host, &Ledger::open(Path::new(directory))?, addresses),
        ["recover", directory] => {
            let start = Instant::now();
            for recovered in recover(&host, &Ledger::open(Path::new(directory))?)? {
                println!("{recovered:#?}");
            }
            println!("recovered in {:?}", start.elapsed());
            Ok(())
        }
        _ => Err("see the head of this file for what it takes".into()),
    }
}

fn list(host: &Host) -> Result<(), Box<dyn Error>> {
    let functions = host.functions()?;
    for function in &functions {
        let verdict = assignable(host, &functions, None, &[function.address]);
        let verdict = verdict.map_or_else(|refusal| refusal.to_string(), |()| "can be given away".to_owned());
        println!(
            "{} {} {} ({})",
            function.address, function.vendor_name, function.device_name, function.class_name
        );
        println!(
            "    driver {:?}, group {:?} {:?}",
            function.driver, function.iommu_group, function.group_mates
        );
        println!("    reset {:?}, bars {:x?}", function.reset_methods, function.bars);
        println!("    {verdict}");
    }
    Ok(())
}

fn request(addresses: &[&str]) -> Result<ClaimRequest, Box<dyn Error>> {
    let addresses =
        addresses.iter().map(|address| address.parse()).collect::<Result<Vec<PciAddress>, _>>()?;
    Ok(ClaimRequest {
        owner: Owner::this_process("example")?,
        addresses,
        digests: Vec::new(),
        scrub: Vec::new(),
        judged: false,
    })
}

fn cycle(host: &Host, ledger: &Ledger, addresses: &[&str]) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let claim = claim(host, ledger, request(addresses)?)?;
    println!("claimed in {:?}: container {:?}, groups {:?}", start.elapsed(), claim.container, claim.groups);
    for device in &claim.devices {
        println!("  {} is {:?}, from {:?}", device.address, device.fd, device.former_driver);
        // What any guest does: bus mastering on, through VFIO's config region (linux/vfio_pci_core.h: index 7 << 40).
        let command = 7u64 << 40 | 4;
        let file = File::from(device.fd.try_clone()?);
        file.write_all_at(&7u16.to_le_bytes(), command)?;
    }
    let start = Instant::now();
    for returned in claim.release(host, ledger, &mut |_| None) {
        println!("{returned:#?}");
    }
    println!("released in {:?}", start.elapsed());
    Ok(())
}

fn hold(host: &Host, ledger: &Ledger, addresses: &[&str]) -> Result<(), Box<dyn Error>> {
    let claim = claim(host, ledger, request(addresses)?)?;
    let device = claim.devices.first().ok_or("no device")?.fd.try_clone()?;
    let guest = Command::new("sleep").arg("1000").stdin(Stdio::from(device)).spawn()?;
    ledger.note_cell(claim.owner(), guest.id())?;
    println!("held");
    std::io::stdout().flush()?;
    thread::sleep(Duration::from_secs(1000));
    Ok(())
}
