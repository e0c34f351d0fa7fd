//! The keep, which is not root once it reads anything, and its broker, which is, and gives it little.

use std::{
    fs,
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use casemate_broker::{Broker, CellWanted, Claiming, ConsoleLog, Knob, Node, Places, Rules, What, hands};
use casemate_host::{DmaNeeds, TapRequest};
use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, wait_until},
};
use casemate_spec::{IoRules, Name, Pooled, Refusal};
use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::Signal,
};

use crate::endings::{SOON, broker_of, cell_of};

/// Asks that whose status this is has no right at all but these.
fn expect_no_rights(status: &str, capabilities: &str) -> Result<(), Failure> {
    let name = line(status, "Name:");
    for (what, found) in [
        ("CapInh:", "0000000000000000"),
        ("CapPrm:", capabilities),
        ("CapEff:", capabilities),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Groups:", ""),
    ] {
        expect!(line(status, what) == found, "{name}: {what} {}", line(status, what));
    }
    Ok(())
}

/// A line of `/proc/PID/task/TID/status`.
fn line<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("none").trim()
}

pub(crate) fn is_not_root(ctx: &mut Ctx) -> Result<(), Failure> {
    let disk = ctx.directory().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20])?;
    let guest = ctx.guest("sleep 1000")?.vcpus(1).slots(1).disk(&disk, false).net("cmtest0", "192.0.2.1/24");
    let running = ctx.start_guest(&guest)?;
    running.wait_for_text("CASEMATE-INIT", SOON)?;
    let (_, uid_of_cell) = cell_of(&running)?;
    let keep = running.pid();
    let mut threads = 0;
    for thread in fs::read_dir(format!("/proc/{keep}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let name = line(&status, "Name:");
        let uids: Vec<u32> =
            line(&status, "Uid:").split_whitespace().filter_map(|uid| uid.parse().ok()).collect();
        expect!(
            uids.len() == 4 && uids.iter().all(|uid| *uid >= 0x4361_0000 && *uid != uid_of_cell),
            "thread {name} has uids {uids:?}, the cell {uid_of_cell}"
        );
        expect_no_rights(&status, "0000000000000000")?;
        threads += 1;
    }
    expect!(threads > 3, "the keep has {threads} threads");
    let broker = fs::read_to_string(format!("/proc/{}/status", broker_of(&running)?))?;
    expect!(line(&broker, "Uid:").starts_with('0'), "the broker is {}", line(&broker, "Uid:"));
    running.signal(Signal::TERM)?;
    running.wait(Duration::from_secs(30))?.success()?;
    Ok(())
}

/// The host file is a pipe here, and who reads it is looked at while it waits for the words.
pub(crate) fn host_file_is_read_without_rights(ctx: &mut Ctx) -> Result<(), Failure> {
    const MAY_READ: &str = "0000000000000004";
    let file = ctx.directory().join("host.toml");
    ctx.shell(&format!("mkfifo {}", file.display()))?;
    let file_text = file.to_str().ok_or_else(|| Failure::new("the folder's name is no text"))?;
    let listing = ctx.start(["casemate", "--host-config", file_text, "devices"])?;
    let status = || fs::read_to_string(format!("/proc/{}/status", listing.pid())).unwrap_or_default();
    wait_until("casemate devices is root no longer", SOON, || line(&status(), "NoNewPrivs:") == "1")?;
    // It reads nothing before: opening the pipe to write waits until it is opened to be read.
    let mut words = fs::File::options().write(true).open(&file)?;
    let status = status();
    let uid = line(&status, "Uid:");
    expect!(
        uid.split_whitespace().all(|uid| uid.parse().is_ok_and(|uid: u32| uid >= 0x4361_0000)),
        "it is {uid}"
    );
    expect_no_rights(&status, MAY_READ)?;
    words
        .write_all(format!("[[pool]]\nname = \"read\"\naddresses = [\"{}\"]\n", devices::NVME).as_bytes())?;
    drop(words);
    let listed = listing.wait(SOON)?;
    listed.success()?;
    let drive = listed.stdout.lines().find(|line| line.starts_with(devices::NVME)).unwrap_or_default();
    expect!(drive.contains(" read "), "its pool isn't told: {drive}");
    Ok(())
}

/// What somebody who had captured a keep would ask of its broker. A thread of this test gives up being root as a keep does.
pub(crate) fn captured_one_gets_nothing(ctx: &mut Ctx) -> Result<(), Failure> {
    let secret = ctx.directory().join("secret");
    fs::write(&secret, vec![1; 1 << 20])?;
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let folder = ctx.directory().to_owned();
    let places = Places {
        state: folder.join("state"),
        cache: folder.join("cache"),
        runtime: "/run/casemate-captured".into(),
        cgroup: "/sys/fs/cgroup/casemate".into(),
        vmm: ctx.program("casemate-vmm")?,
        policy_compiler: ctx.program("casemate-policy-compiler")?,
        policy_engine: ctx.program("casemate-policy-engine")?,
    };
    let program = ctx.program("casemate-broker")?;
    let captured = thread::spawn(move || {
        let broker = casemate_broker::begin(&program, places).map_err(Failure::new)?;
        let tried = try_all(broker, &folder, &secret);
        broker.end();
        tried
    });
    captured.join().map_err(|_| Failure::new("the thread panicked"))??;
    expect!(!Path::new("/run/casemate-captured/captured.socket").exists(), "the cell's socket is left");
    expect!(!Path::new("/sys/fs/cgroup/casemate/captured").exists(), "the cell's cgroup is left");
    Ok(())
}

fn try_all(broker: &'static Broker, folder: &Path, secret: &PathBuf) -> Result<(), Failure> {
    let name = Name::new("captured").ok_or_else(|| Failure::new("no name"))?;
    broker.set_rules(Rules::default())?;
    broker.reserve(&name)?;
    let read_only = What::Raw { read_only: true };
    // Before a guest runs, what its file names is opened.
    drop(hands::open(read_only, secret)?);
    // This thread gave up its rights; the test's others have theirs, and that is seen.
    expect!(broker.close_the_door().is_err_and(|refusal| refusal.code == "broker-gone"), "nobody looked");
    expect!(fs::read(secret).is_err(), "the file could be read without the broker");
    expect!(fs::read("/proc/version").is_ok(), "what all may read can't be read");
    // Where all may write.
    for path in ["/tmp/captured", "/dev/shm/captured"] {
        expect!(fs::write(path, "x").is_err(), "it could write {path}");
    }
    expect!(
        std::process::Command::new("/proc/self/exe").arg("--list").status().is_err(),
        "it could start a program"
    );
    let (_log, write) = pipe_with(PipeFlags::CLOEXEC)?;
    let wanted = CellWanted {
        rlimits: [1 << 20, 256, 64, 1 << 20],
        memory_bytes_max: 128 << 20,
        pids_max: 32,
        cpus_max: 1,
        io: IoRules::default(),
        disks: Vec::new(),
        without_device: Vec::new(),
        guest_memory_bytes: 64 << 20,
    };
    let (cell, _way) = broker.close_cell(wanted.clone(), write.as_fd())?;
    let drive = devices::NVME.parse().map_err(|_| Failure::new("no address"))?;
    let pooled = [Pooled { pool: name.clone(), table: 0 }];
    let needs = DmaNeeds { ram: Vec::new(), emulated_vectors: 0, overhead_bytes: 0, set_aside_bytes: 0 };
    let claiming = Claiming {
        slot: Some(1),
        tenant: name.clone(),
        addresses: vec![drive],
        judged: false,
        needs,
        macs: vec![[2; 6]],
    };
    let at_start = Claiming { slot: None, ..claiming.clone() };
    let tap = TapRequest { name: "captured0".into(), host_address: None, bridge: None, queues: 1 };
    let log = ConsoleLog { path: &folder.join("log"), file_bytes: 1 << 20, files: 1 };
    let code = |refusal: Refusal| refusal.code;
    let attempts: Vec<(&str, Option<&str>)> = vec![
        ("read a file", hands::open(read_only, secret).err().map(code)),
        ("write a file", hands::open(What::Raw { read_only: false }, secret).err().map(code)),
        ("open a kernel", hands::open(What::Kernel, secret).err().map(code)),
        ("open a qcow2 image", hands::open(What::Qcow2 { read_only: true }, secret).err().map(code)),
        ("make a tap", hands::tap(&tap).err().map(code)),
        ("open /dev/kvm", broker.open_node(Node::Kvm).err().map(code)),
        ("claim a drive for a slot", broker.claim(claiming).err().map(|failed| failed.refusal.code)),
        ("claim a drive for the start", broker.claim(at_start).err().map(|failed| failed.refusal.code)),
        ("make virtual functions", broker.make_virtual(Some(1), &pooled).err().map(code)),
        ("make a socket", broker.listen(&folder.join("socket"), "vsock-socket").err().map(code)),
        ("write to a log of its choice", broker.keep_console(log).err().map(code)),
        ("be another guest", broker.reserve(&name).err().map(code)),
        ("change the host's rules", broker.set_rules(Rules::default()).err().map(code)),
        ("have others' devices given back", broker.recover().err().map(code)),
        ("close another cell", broker.close_cell(wanted, write.as_fd()).err().map(code)),
    ];
    for (attempt, refused) in attempts {
        println!("{attempt}: {refused:?}");
        expect!(refused == Some("broker-not-granted"), "a captured keep could {attempt}: {refused:?}");
    }
    expect!(broker.speak(secret, 1).is_err(), "it could connect beside a path of its choice");
    // What governors turn stays within what the cell was given.
    broker.turn(Knob::CpuQuota(u64::MAX)).map_err(Failure::new)?;
    let quota = fs::read_to_string("/sys/fs/cgroup/casemate/captured/cpu.max")?;
    expect!(quota.trim() == "100000 100000", "the cell may take {quota}");
    cell.close()?;
    Ok(())
}
