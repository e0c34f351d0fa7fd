//! The small devices of the board: watchdog, generation, clock.

use std::time::Duration;

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure},
};

use crate::endings::ending;

/// For a guest to come to its script and through it.
const SOON: Duration = Duration::from_secs(90);

/// The identifier of the machine's generation, by the driver's presence and from memory.
const GENERATION: &str = "echo driver: $(basename $(readlink /sys/bus/*/devices/VMGENCTR:00/driver))
    echo generation: $(devmem 0xFE000 64)$(devmem 0xFE008 64)";

/// A guest that keeps its watchdog quiet runs on; one that stops to is ended, and told apart from all others.
pub(crate) fn watchdog_bites(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = format!(
        "{GENERATION}
        modprobe wdat_wdt; echo dog: $(cat /sys/class/watchdog/watchdog0/identity)
        watchdog -t 1 -T 8 -F /dev/watchdog0 & sleep 12; echo was-kept-quiet
        kill -9 $!; echo nobody-keeps-it-quiet; sleep 60; echo nobody-cared"
    );
    let run = ctx.start_guest(&ctx.guest(&script)?.vcpus(1))?.wait(SOON)?;
    run.printed("was-kept-quiet")?.printed("nobody-keeps-it-quiet")?;
    expect!(run.value("dog:")? == "wdat_wdt", "the watchdog is {}", run.value("dog:")?);
    expect!(!run.stdout.contains("nobody-cared"), "the watchdog did not bite");
    expect!(ending(&run)? == "watchdog", "the guest ended by {}", ending(&run)?);
    expect!(run.status.code() == Some(3), "the exit code is {:?}, not 3", run.status.code());
    expect!(run.value("driver:")? == "vmgenid", "no driver for the generation: {}", run.value("driver:")?);

    // The same machine once more is another machine.
    let again = ctx.run_guest(&ctx.guest(GENERATION)?.vcpus(1))?;
    let (first, second) = (run.value("generation:")?, again.success()?.value("generation:")?);
    expect!(first != second && first.len() == 36, "two lives have the generations {first} and {second}");
    Ok(())
}
