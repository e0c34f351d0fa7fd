use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{
    calls::CALLS,
    compile::{Condition, IOCTLS, load, parse, source, source_alone},
};

const ARCH_X86_64: u32 = 0xc000_003e;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

/// What the kernel shows a filter of one call.
#[derive(Clone, Copy, Debug)]
struct Call {
    architecture: u32,
    number: u32,
    arguments: [u64; 6],
}

impl Call {
    fn new(name: &str, arguments: [u64; 6]) -> Self {
        let number = CALLS.iter().find(|(_, known)| *known == name).unwrap().0;
        Self { architecture: ARCH_X86_64, number, arguments }
    }

    /// The word at this offset of `struct seccomp_data`.
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.architecture,
            16..64 => (self.arguments[(offset as usize - 16) / 8] >> (8 * (offset % 8))) as u32,
            _ => panic!("offset {offset}"),
        }
    }
}

/// Runs a program as the kernel does, for the instructions that filters are made of.
fn judge(program: &[libc::sock_filter], call: &Call) -> u32 {
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let libc::sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |holds: bool| if holds { usize::from(jt) } else { usize::from(jf) };
        match code {
            0x20 => accumulator = call.word(k),
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x06 => return k,
            _ => panic!("instruction {code:#x}"),
        }
    }
}

/// A call that the rule means.
fn meant(rule: &Rule) -> Call {
    let mut call = Call::new(rule.call, [0; 6]);
    for text in rule.when {
        let condition = Condition::parse(rule.call, text).unwrap();
        call.arguments[usize::from(condition.argument)] |= condition.value;
    }
    call
}

/// Whether a rule of the role speaks of this call with these arguments; `fails_with` rules are left out.
fn is_allowed_by_rules(role: Role, call: &Call) -> bool {
    rules(role).iter().filter(|rule| rule.fails_with.is_none() && meant(rule).number == call.number).any(
        |rule| {
            rule.when.iter().all(|text| {
                let Condition { argument, mask, value, .. } = Condition::parse(rule.call, text).unwrap();
                call.arguments[usize::from(argument)] & mask == value
            })
        },
    )
}

#[test]
fn every_rule_lets_its_call_through_in_its_role_and_while_building() {
    for role in Role::ALL {
        for rule in rules(role) {
            let verdict =
                if rule.fails_with.is_none() { ALLOW } else { libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32 };
            assert_eq!(judge(role.program(), &meant(rule)), verdict, "{role}: {rule:?}");
            assert_eq!(
                judge(role.first().unwrap_or(role).program(), &meant(rule)),
                verdict,
                "{role}: {rule:?}"
            );
        }
    }
}

#[test]
fn a_call_without_a_rule_kills() {
    for role in Role::ALL {
        let named: BTreeSet<_> = rules(role).iter().map(|rule| rule.call).collect();
        for (number, name) in CALLS.iter().filter(|(_, name)| !named.contains(name)) {
            let call = Call { architecture: ARCH_X86_64, number: *number, arguments: [0; 6] };
            assert_eq!(judge(role.program(), &call), KILL, "{role}: {name}");
        }
    }
}

#[test]
fn other_architectures_and_x32_kill() {
    for role in Role::ALL {
        for rule in rules(role).iter().filter(|rule| rule.fails_with.is_none()) {
            let call = meant(rule);
            assert_eq!(
                judge(role.program(), &Call { architecture: 0x4000_0003, ..call }),
                KILL,
                "{role}: {rule:?}"
            );
            let x32 = Call { number: call.number | 0x4000_0000, ..call };
            assert_eq!(judge(role.program(), &x32), KILL, "{role}: {rule:?}");
        }
    }
}

#[test]
fn no_role_has_executable_memory_paths_sockets_or_processes() {
    for role in Role::ALL {
        for call in ["mmap", "mprotect"] {
            for protection in
                [libc::PROT_EXEC, libc::PROT_EXEC | libc::PROT_READ, libc::PROT_EXEC | libc::PROT_WRITE]
            {
                let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
                let call = Call::new(call, [0, 4096, protection as u64, flags, 0, 0]);
                assert_eq!(judge(role.program(), &call), KILL, "{role}: {call:?}");
            }
        }
        for never in [
            "open",
            "openat",
            "openat2",
            "creat",
            "socket",
            "connect",
            "bind",
            "execve",
            "execveat",
            "fork",
            "vfork",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "mount",
            "unshare",
            "setns",
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "keyctl",
            "memfd_create",
            "modify_ldt",
            "pkey_mprotect",
            "personality",
            "shmat",
            "kill",
            "pidfd_getfd",
            "name_to_handle_at",
            "open_by_handle_at",
        ] {
            assert!(rules(role).iter().all(|rule| rule.call != never), "{role}: {never}");
        }
    }
}

/// A ring is made and bound while the machine is built, and then only used; one that waits for a disk is told of its file.
#[test]
fn rings_are_made_before_the_guest_runs() {
    for (call, expected) in [("io_uring_setup", Role::Build), ("io_uring_register", Role::Build)] {
        for role in Role::ALL {
            let has = rules(role).iter().any(|rule| rule.call == call);
            let names_files = role == Role::Hotplug && call == "io_uring_register";
            assert_eq!(has, role == expected || names_files, "{role}: {call}");
        }
    }
    let files = Call::new("io_uring_register", [3, 6, 0, 1, 0, 0]);
    assert_eq!(judge(Role::Hotplug.program(), &files), ALLOW);
    for other in (0..40).filter(|opcode| *opcode != 6) {
        let call = Call::new("io_uring_register", [3, other, 0, 1, 0, 0]);
        assert_eq!(judge(Role::Hotplug.program(), &call), KILL, "{other}");
    }
}

#[test]
fn ioctls_are_told_apart_by_role() {
    for (name, request) in IOCTLS {
        let call = Call::new("ioctl", [3, u64::from(*request), 0, 0, 0, 0]);
        for role in Role::ALL {
            let verdict = if is_allowed_by_rules(role, &call) { ALLOW } else { KILL };
            assert_eq!(judge(role.program(), &call), verdict, "{role}: {name}");
        }
        let roles = Role::NARROW.into_iter().filter(|role| judge(role.program(), &call) == ALLOW);
        assert_eq!(roles.collect::<Vec<_>>(), narrow_roles_of(name), "{name}");
    }
}

/// The threads that may make a request of ioctl(2) once the guest runs.
fn narrow_roles_of(request: &str) -> &'static [Role] {
    match request {
        "KVM_RUN" | "KVM_KVMCLOCK_CTRL" => &[Role::Vcpu],
        // Whoever raises a pin of the IOAPIC.
        "KVM_SIGNAL_MSI" => &[Role::Vcpu, Role::Control, Role::Console, Role::Intx],
        "KVM_SET_GSI_ROUTING"
        | "KVM_IRQFD"
        | "KVM_IOEVENTFD"
        | "KVM_SET_USER_MEMORY_REGION"
        | "VFIO_DEVICE_SET_IRQS"
        | "VFIO_DEVICE_RESET" => &[Role::Control],
        // Functions of the host's that come while the guest runs. The hot reset has the number of mapping: it is of functions whose
        // groups the process has all.
        "KVM_SET_DEVICE_ATTR"
        | "VFIO_GET_API_VERSION"
        | "VFIO_DEVICE_GET_INFO"
        | "VFIO_DEVICE_GET_REGION_INFO"
        | "VFIO_DEVICE_GET_IRQ_INFO" => &[Role::Hotplug],
        "VFIO_IOMMU_MAP_DMA" | "VFIO_DEVICE_PCI_HOT_RESET" | "VFIO_IOMMU_UNMAP_DMA" => {
            &[Role::Hotplug, Role::Peers]
        }
        "TUNSETOFFLOAD" => &[Role::Net, Role::Spare],
        "TUNSETQUEUE" => &[Role::Net],
        "VHOST_SET_FEATURES"
        | "VHOST_SET_MEM_TABLE"
        | "VHOST_SET_VRING_NUM"
        | "VHOST_SET_VRING_BASE"
        | "VHOST_SET_VRING_ADDR"
        | "VHOST_SET_VRING_KICK"
        | "VHOST_SET_VRING_CALL"
        | "VHOST_SET_VRING_ERR"
        | "VHOST_NET_SET_BACKEND" => &[Role::Net],
        _ => &[],
    }
}

/// Firecracker's filters for x86-64 allow 50 calls (VMM thread) and 27 (vCPU thread), counted in its repository; ours
/// allow fewer, and as many as docs/cell.md says.
#[test]
fn the_filters_stay_short() {
    let document = include_str!("../../../docs/cell.md");
    for role in Role::NARROW {
        // Whatever comes into a slot is one thread's there as well: the VMM's.
        let most = if matches!(role, Role::Control | Role::Spare) { 50 } else { 27 };
        assert!(calls_of(role) < most, "{role}: {}", calls_of(role));
        let line = document.lines().find(|line| line.starts_with(&format!("| `{role}` |")));
        let told = line.and_then(|line| line.split('|').nth(3)?.trim().parse().ok());
        assert_eq!(told, Some(calls_of(role)), "{role} in docs/cell.md");
    }
    assert!(calls_of(Role::Compiler) < 15, "{}", calls_of(Role::Compiler));
    // The kernel translates them for each thread, and runs them at each call.
    for (role, most) in [(Role::Build, 450), (Role::Control, 160), (Role::Vcpu, 110)] {
        assert!(role.program().len() <= most, "{role} has {} instructions", role.program().len());
    }
}

#[test]
fn names_are_found() {
    assert_eq!(call_name(257), Some("openat"));
    assert_eq!(call_name(335), None);
    assert!(CALLS.is_sorted());
    assert_eq!(Role::ALL.map(|role| Role::from_name(role.name())), Role::ALL.map(Some));
}

#[test]
fn what_is_wrong_with_a_file_is_told_with_its_line() {
    for (text, message) in [
        ("[[rule]]\ncall = \"read\"", "f:1: missing field `why`"),
        ("[[rule]]\ncall = \"raed\"\nwhy = \"x\"", "f:2: raed: x86-64 has no call of this name"),
        (
            "[[rule]]\ncall = \"read\"\nwhy = \" \"",
            "f:3: read: `why` is empty; say what the call is needed for",
        ),
        (
            "\n[[rule]]\ncall = \"read\"\nwhy = \"x\"\nif = 3",
            "f:5: unknown field `if`, expected one of `call`, `when`, `fails_with`, `why`, `unseen`",
        ),
        (
            "[[rule]]\ncall = \"ioctl\"\nwhy = \"x\"\nwhen = [\n  \"arg1 == KVM_RUNN\"]",
            "f:5: ioctl: \"KVM_RUNN\" is neither a number nor a constant of jail/filters/compile/constants.rs; add it there",
        ),
        (
            "[[rule]]\ncall = \"mmap\"\nwhy = \"x\"\nwhen = [\"arg2 & 4 == 1\"]",
            "f:4: mmap: \"arg2 & 4 == 1\" can never hold: 0x1 has bits that are not looked at",
        ),
        (
            "[[rule]]\ncall = \"read\"\nwhy = \"x\"\nfails_with = \"ESOME\"",
            "f:4: read: \"ESOME\" is not an error known here",
        ),
        (
            "[[rule]]\ncall = \"read\"\nwhy = \"x\"\n[[rule]]\ncall = \"read\"\nwhy = \"y\"\nwhen = [\"arg0 == 1\"]",
            "f:5: read: this rule is idle: f:2 covers it; take one of the two out",
        ),
        (
            "[[rule]]\ncall = \"read\"\nwhy = \"x\"\n[[rule]]\ncall = \"read\"\nwhy = \"y\"\n",
            "f:5: read: this rule is idle: f:2 covers it; take one of the two out",
        ),
    ] {
        assert_eq!(parse("f", text).unwrap_err(), message);
    }
}

#[test]
fn the_building_filter_may_not_repeat_a_narrower_one() {
    let exit = "[[rule]]\ncall = \"exit\"\nwhy = \"x\"";
    let build = parse("b", exit).unwrap();
    let vcpu = || parse("v", &format!("\n\n{exit}")).unwrap();
    let empty = parse("r", "").unwrap();
    assert_eq!(
        source("BUILD", &build, &[("vcpu", vcpu())]).unwrap_err(),
        "b:2: exit: this rule is idle: v:4 covers it; take one of the two out"
    );
    let text = source("BUILD", &empty, &[("vcpu", vcpu()), ("net", vcpu())]).unwrap();
    assert!(text.contains("VCPU_PROGRAM") && text.contains("NET_PROGRAM"));
    let (_, build) = text.split_once("BUILD_RULES").unwrap();
    assert_eq!(build.matches("call: \"exit\"").count(), 1, "{build}");
    assert!(source_alone(&empty, "REST").unwrap().contains("REST_PROGRAM"));
}

#[test]
fn what_a_file_takes_in_is_not_said_again() {
    let files = |own: &str| {
        let own = own.to_owned();
        move |name: &str| {
            Ok(match name {
                "role.toml" => own.clone(),
                "part.toml" => "[[rule]]\ncall = \"brk\"\nwhy = \"x\"".to_owned(),
                _ => "with = [\"role\"]".to_owned(),
            })
        }
    };
    let own = "with = [\"part\"]\n[[rule]]\ncall = \"exit\"\nwhy = \"x\"";
    let file = load("role", &files(own)).unwrap();
    assert_eq!(file.rules.iter().map(|rule| rule.call.as_str()).collect::<Vec<_>>(), ["exit", "brk"]);
    assert_eq!(
        load("role", &files(&own.replace("exit", "brk"))).unwrap_err(),
        "jail/filters/role.toml:3: brk: this rule is idle: jail/filters/part.toml:2 covers it; take one of the two out"
    );
    assert!(load("deep", &files(own)).unwrap_err().contains("takes in others"));
}

proptest! {
    /// The compiled program and the rules as they are shown say the same of any call.
    #[test]
    fn programs_do_what_the_rules_say(
        number in 0u32..480,
        small in proptest::array::uniform6(prop_oneof![0u64..64, 128u64..300, Just(0x4022), Just(1 << 32), any::<u64>()]),
        request in 0..IOCTLS.len(),
    ) {
        let mut call = Call { architecture: ARCH_X86_64, number, arguments: small };
        for role in Role::ALL {
            for (number, request) in [(number, small[1]), (16, u64::from(IOCTLS[request].1))] {
                call.number = number;
                call.arguments[1] = request;
                let errno = rules(role).iter().any(|rule| rule.fails_with.is_some() && meant(rule).number == number);
                let verdict = judge(role.program(), &call);
                prop_assert_eq!(verdict == ALLOW, is_allowed_by_rules(role, &call), "{}: {:?}", role, call);
                prop_assert_eq!(verdict == KILL, !errno && verdict != ALLOW, "{}: {:?}", role, call);
            }
        }
    }

    #[test]
    fn reading_never_panics(text in ".{0,60}", condition in "[a-zA-Z0-9_&|= ]{0,30}") {
        let _ = parse("f", &text);
        let _ = Condition::parse("ioctl", &condition);
        let _ = parse("f", &format!("[[rule]]\ncall = \"ioctl\"\nwhy = \"x\"\nwhen = [{condition:?}]"));
    }
}
