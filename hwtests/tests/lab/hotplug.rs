//! Slots for what comes while a guest runs.

use casemate_hwtests::{
    expect,
    harness::{Ctx, Failure},
};

/// Linux takes root ports, buses and windows as they were placed, and drives each slot natively.
pub(crate) fn slots_are_seen(ctx: &mut Ctx) -> Result<(), Failure> {
    let script = "echo slots: $(ls /sys/bus/pci/slots)
        echo empty: $(cat /sys/bus/pci/slots/*/power)
        echo drivers: $(cat /proc/interrupts | grep -c 'pciehp')
        for port in /sys/bus/pci/devices/*; do
            [ $(cat $port/class) = 0x060400 ] || continue
            echo port: ${port##*/} $(cat $port/secondary_bus_number) $(cat $port/subordinate_bus_number) \
                windows $(sed -n '14,16p' $port/resource | grep -c -v '^0x0* 0x0*')
        done
        echo complaints: $(dmesg | grep -c -e \"can't claim\" -e 'no space' -e 'failed to assign' -e 'BAR.*: assigned' \
            -e 'bridge window.*: assigned')
        dmesg | grep -e pciehp -e 'PCI bridge' -e 'bridge window' -e _OSC";
    let run = ctx.run_guest(&ctx.guest(script)?.slots(3))?;
    run.success()?;
    expect!(run.value("slots:")? == "1 2 3", "Linux sees the slots {}", run.value("slots:")?);
    expect!(run.value("empty:")? == "0 0 0", "their power is {}", run.value("empty:")?);
    expect!(run.value("drivers:")? == "3", "{} of them interrupt", run.value("drivers:")?);
    for (function, bus) in (0..3).zip(1..) {
        let line = format!("0000:00:03.{function} {bus} {bus} windows 2");
        run.printed(&line)?;
    }
    expect!(run.value("complaints:")? == "0", "Linux placed something itself");
    Ok(())
}
