//! `cargo xtask demo`: the main job, shown step by step.
//!
//! Outside, it prepares the lab, builds the programs, and starts itself in the lab as `demo --here`. Inside (or on real
//! hardware, when somebody asks for that and names the devices) it runs the steps in [`stage`].

mod stage;
mod watch;

use std::{env, fs, path::PathBuf, process::ExitCode, time::Duration};

use casemate_hwtests::{
    Console, Lab, LabError, Layout,
    harness::{GuestFile, GuestImage},
};
use clap::Args;

use crate::{
    lab, progress,
    steps::{Parts, Tests, build_programs, programs, target_directory, workspace},
};

/// Set in the lab: the devices there are nobody's, and may be taken unasked.
const IN_LAB: &str = "CASEMATE_DEMO_IN_LAB";
const DEADLINE: Duration = Duration::from_secs(600);

#[derive(Args)]
pub(crate) struct DemoArguments {
    /// Run on this very machine instead of the lab; it needs KVM, an IOMMU, root, and the devices you name
    #[arg(long)]
    here: bool,
    /// A PCI function to give to the guest, such as 0000:03:00.0; it leaves its driver for the time. May be repeated
    #[arg(long = "device", value_name = "ADDRESS", requires = "here")]
    devices: Vec<String>,
}

/// The guest's files in the lab's directory, as `examples/nvme-and-nic.toml` names them.
struct Files {
    initrd: PathBuf,
    disk: PathBuf,
}

impl Files {
    fn of(layout: &Layout) -> Self {
        Self { initrd: layout.root().join("demo.cpio"), disk: layout.root().join("demo.img") }
    }
}

pub(crate) fn run(arguments: &DemoArguments) -> Result<ExitCode, LabError> {
    let in_lab = env::var_os(IN_LAB).is_some();
    if !arguments.here {
        return run_in_lab();
    }
    if in_lab {
        let example = PathBuf::from("examples/nvme-and-nic.toml");
        return Ok(stage::Stage {
            programs: programs(),
            guest: example,
            in_lab,
            disk: Files::of(&Layout::of_workspace()).disk,
        }
        .play());
    }
    if arguments.devices.is_empty() {
        return Err(LabError::new(
            "the demo takes no device of this machine's by itself",
            "name one with --device ADDRESS (`casemate devices` lists them), or leave --here out to use the lab",
        ));
    }
    let layout = built()?;
    let guest = guest_of_this_machine(&layout, &arguments.devices)?;
    let stage = stage::Stage { programs: programs(), guest, in_lab, disk: Files::of(&layout).disk };
    Ok(stage.play())
}

fn run_in_lab() -> Result<ExitCode, LabError> {
    let layout = built()?;
    let this = env::current_exe().map_err(|error| {
        LabError::new(format_args!("cannot tell this program's path: {error}"), "report this")
    })?;
    println!("\n== the lab starts: a machine with AMD-V, an Intel IOMMU and PCIe devices (about 10 s)");
    env::set_current_dir(workspace()).map_err(|error| {
        LabError::new(format_args!("cannot enter the workspace: {error}"), "check its mode")
    })?;
    let mut machine = Lab::new(&layout, [this.as_os_str(), "demo".as_ref(), "--here".as_ref()])
        .environment(IN_LAB, "1")
        .environment("CARGO_TARGET_DIR", target_directory())
        .environment("CASEMATE_LAB_DIR", layout.root())
        .environment(progress::WATCHED, if progress::watched() { "1" } else { "0" })
        .console(Console::Shown)
        .start()?;
    lab::exit_code(&machine.wait(DEADLINE))
}

/// The lab prepared, the programs built, the guest's image and disk made.
fn built() -> Result<Layout, LabError> {
    println!("== the lab (installs packages the first time)");
    let layout = lab::prepare()?;
    let mut parts = Parts::default();
    if !parts.run("builds casemate (some minutes the first time)", build_programs(Tests::No)) {
        return Err(LabError::new("the build failed", "see the compiler's messages above"));
    }
    let files = Files::of(&layout);
    let image = GuestImage::new(include_str!("demo/guest.sh")).write(&layout, &files.initrd);
    let disk =
        fs::write(&files.disk, b"casemate demo disk\n".repeat(1 << 14).get(..256 << 10).unwrap_or_default());
    match (image, disk) {
        (Ok(()), Ok(())) => Ok(layout),
        (image, disk) => Err(LabError::new(
            format_args!("cannot write the guest's image or disk: {image:?} {disk:?}"),
            format_args!("check {}", layout.root().display()),
        )),
    }
}

/// A guest's file like the example's, with the devices that were named.
fn guest_of_this_machine(layout: &Layout, devices: &[String]) -> Result<PathBuf, LabError> {
    let files = Files::of(layout);
    let mut guest = GuestFile::new("demo", &layout.guest_kernel(), &files.initrd).disk(&files.disk, true);
    for address in devices {
        guest = guest.device(address);
    }
    guest.net("cm-demo", "192.0.2.1/24").write_into(layout.root()).map_err(|failure| {
        LabError::new(format_args!("cannot write the guest's file: {failure:?}"), "check target/lab")
    })
}
