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

/// What a guest is told of itself, and what it makes of its clock chip.
const WHO: &str = "cd /sys/class/dmi/id; echo maker: $(cat sys_vendor); echo uuid: $(cat product_uuid)
    echo serial: $(cat product_serial); echo string: $(grep -a -o 'casemate.test=[a-z ]*' /sys/firmware/dmi/tables/DMI)
    echo clock: $(cat /sys/class/rtc/rtc0/name)";

/// It finds what its file says that it is, and a clock that it can set.
pub(crate) fn guest_knows_who_it_is(ctx: &mut Ctx) -> Result<(), Failure> {
    const UUID: &str = "5c0dd0c7-0e1c-4d0c-9c1d-2f4a5b6c7d8e";
    let script = format!(
        "{WHO}; clock=/sys/class/rtc/rtc0; echo apart: $(($(cat $clock/since_epoch) - $(date +%s)))
        date -u -s '2031-02-28 23:59:59' >/dev/null; hwclock -w -u; sleep 2; echo then: $(cat $clock/date)"
    );
    let keys = format!(
        "uuid = \"{UUID}\"\nserial = \"ds=nocloud\"\noem_strings = [\"first\", \"casemate.test=some words\"]\nrtc = true"
    );
    let run = ctx.run_guest(&ctx.guest(&script)?.table("platform", &keys)?)?;
    let of = |key| run.value(key);
    expect!((of("maker:")?, of("uuid:")?) == ("Casemate", UUID), "it is {}", of("uuid:")?);
    expect!(of("serial:")? == "ds=nocloud", "its serial number is {}", of("serial:")?);
    expect!(of("string:")? == "casemate.test=some words", "it was told {}", of("string:")?);
    expect!(of("clock:")?.starts_with("rtc_cmos"), "its clock chip is {}", of("clock:")?);
    let apart: i64 = of("apart:")?.parse()?;
    expect!((-2..=2).contains(&apart), "its clock chip is {apart} s ahead");
    expect!(of("then:")? == "2031-03-01", "two seconds after it was set its clock chip has {}", of("then:")?);

    // One whose file says nothing is the same at each start, has a UUID of its own, and no clock chip.
    let silent = ctx.guest(WHO)?;
    let uuid = |guest| -> Result<String, Failure> {
        let run = ctx.run_guest(&guest)?;
        expect!(run.value("clock:")?.is_empty(), "it has the clock chip {}", run.value("clock:")?);
        expect!(run.value("serial:")?.is_empty(), "it has the serial number {}", run.value("serial:")?);
        Ok(run.value("uuid:")?.to_owned())
    };
    let (first, second, other) = (uuid(silent.clone())?, uuid(silent.clone())?, uuid(silent.named("other"))?);
    expect!(first == second && first.len() == 36, "one guest has the UUIDs {first} and {second}");
    expect!(first != other && first != UUID, "two guests have the UUID {first}");
    Ok(())
}
