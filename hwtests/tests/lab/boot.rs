//! A guest starts, and ends when it wants to.

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure, Finished},
};

use crate::endings::ending;

pub(crate) fn boots_and_powers_off(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = ctx.guest("uname -r")?;
    let run = ctx.run_guest(&guest)?;
    run.success()?.printed("CASEMATE-INIT")?.printed("CASEMATE-TEST-ENDED 0")?;
    expect!(ending(&run)? == "power-off", "the guest ended by {}", ending(&run)?);
    Ok(())
}

pub(crate) fn sees_what_its_file_says(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "echo vcpus: $(nproc)
        echo online: $(cat /sys/devices/system/cpu/online)
        echo memory: $(awk '/MemTotal/ { print $2 }' /proc/meminfo)
        echo words: $(cat /proc/cmdline)";
    let words = "console=ttyS0 quiet casemate.word=\"two words\" last=1";
    let guest = ctx.guest(script)?.vcpus(3).memory("200 MiB").command_line(words);
    let run = ctx.run_guest(&guest)?;
    run.success()?;
    expect!(run.value("vcpus:")? == "3", "the guest has 3 vCPUs and sees {}", run.value("vcpus:")?);
    expect!(run.value("online:")? == "0-2", "online: {}", run.value("online:")?);
    // Without what the kernel keeps to itself.
    let kib: u64 = run.value("memory:")?.parse()?;
    expect!((140 << 10..=200 << 10).contains(&kib), "the guest has 200 MiB and sees {kib} KiB");
    expect!(
        run.value("words:")? == words,
        "the command line is {words}, the guest sees {}",
        run.value("words:")?
    );
    Ok(())
}

pub(crate) fn reboot_ends_the_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let run = ctx.run_guest(&ctx.guest("reboot -f; sleep 30")?)?;
    ended_otherwise(&run, "reset")
}

pub(crate) fn panic_ends_the_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = ctx.guest("echo c >/proc/sysrq-trigger; sleep 30")?.command_line("console=ttyS0 panic=-1");
    let run = ctx.run_guest(&guest)?;
    run.printed("Kernel panic - not syncing")?;
    ended_otherwise(&run, "reset")
}

pub(crate) fn triple_fault_ends_the_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let guest = ctx.guest("reboot -f; sleep 30")?.command_line("console=ttyS0 quiet reboot=triple");
    ended_otherwise(&ctx.run_guest(&guest)?, "triple-fault")
}

/// The run says how the guest ended, in its report and by exit code 3.
fn ended_otherwise(run: &Finished, how: &str) -> Result<(), Failure> {
    expect!(ending(run)? == how, "the guest ended by {}, not {how}", ending(run)?);
    expect!(run.status.code() == Some(3), "the exit code is {:?}, not 3", run.status.code());
    Ok(())
}
