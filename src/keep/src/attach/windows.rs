//! Whether devices' registers fit into a slot's windows.

use casemate_host::{Bar, BarKind};
use casemate_spec::{ByteSize, Hotplug, PciAddress, Refusal};

/// Each BAR is given pages of its own.
const PAGE_BYTES: u64 = 4096;
/// A window's sizes go by this step.
const MIB: u64 = 1 << 20;

/// Refuses a card that the guest could not give addresses to. BARs and windows are aligned to their sizes, so what is not
/// more than a window finds room in it.
pub(super) fn fit(card: PciAddress, bars: &[Bar], hotplug: &Hotplug) -> Result<(), Refusal> {
    // Below 4 GiB goes all that the prefetchable window, which is above, can't have: 32-bit BARs, and those whose reads have
    // side effects (PCI-to-PCI bridges, 3.2.5.9).
    let is_above = |bar: &Bar| bar.kind == BarKind::Memory64 && bar.prefetchable;
    let is_memory = |bar: &Bar| bar.kind != BarKind::Io;
    let sum = |above: bool| {
        let sizes = bars.iter().filter(|bar| is_memory(bar) && is_above(bar) == above);
        sizes.fold(0u64, |sum, bar| sum.saturating_add(bar.size_bytes.max(PAGE_BYTES)))
    };
    for (above, window, key) in
        [(false, hotplug.memory, "memory"), (true, hotplug.prefetchable_memory, "prefetchable_memory")]
    {
        let wanted = sum(above);
        if wanted > window.bytes() {
            let least = ByteSize::from_bytes(wanted.checked_next_multiple_of(MIB).unwrap_or(wanted));
            let cause =
                format_args!("its registers take {least}, and a slot of this guest has {window} for them");
            let remedy = format_args!(
                "start the guest with {key} = \"{least}\" in its table [hotplug], or with the device"
            );
            return Err(Refusal::new("hotplug-window", card, cause, remedy));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_than_a_window_is_refused_by_its_key() {
        let bar = |size_bytes, kind, prefetchable| Bar { index: 0, size_bytes, kind, prefetchable };
        let hotplug = Hotplug { slots: 1, ..Hotplug::default() };
        let key = |bars: &[Bar]| {
            let refusal = fit("0000:01:00.0".parse().unwrap(), bars, &hotplug).err()?;
            assert_eq!(refusal.code, "hotplug-window");
            Some(refusal.remedy.split(' ').nth(4).unwrap().to_owned())
        };
        assert_eq!(
            key(&[bar(8 * MIB, BarKind::Memory32, false), bar(256 * MIB, BarKind::Memory64, true)]),
            None
        );
        // Which is below 4 GiB, whatever its width.
        let two = [bar(8 * MIB, BarKind::Memory64, false), bar(16, BarKind::Memory32, false)];
        assert_eq!(key(&two).as_deref(), Some("memory"));
        assert_eq!(key(&[bar(16 * MIB, BarKind::Memory32, true)]).as_deref(), Some("memory"));
        let large = bar(512 * MIB, BarKind::Memory64, true);
        assert_eq!(key(&[large, large]).as_deref(), Some("prefetchable_memory"));
        assert_eq!(key(&[bar(1 << 40, BarKind::Io, false)]), None);
    }
}
