//! Where BARs and bridge windows lie when the guest starts.

use casemate_pci::BarKind;

use super::{Body, Place};
use crate::{
    error::Error,
    layout::{self, Range},
};

const PAGE_BYTES: u64 = 4096;

/// How large the windows of each root port are: multiples of 1 MiB, not 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PortWindows {
    /// Memory below 4 GiB, for BARs that are not prefetchable.
    pub(crate) memory_bytes: u64,
    /// Prefetchable memory, above 4 GiB.
    pub(crate) prefetchable_bytes: u64,
}

/// What wants a place.
#[derive(Clone, Copy)]
enum Want {
    /// Function by its index, and its BAR.
    Bar(usize, u8),
    /// A port's window, by the port's index among the functions.
    Window(usize),
}

/// Gives every BAR and every port's windows an address: in each window of the root bus the largest first, so that
/// alignment wastes nothing.
pub(super) fn place(
    functions: &mut [(Place, Body)],
    windows: [Range; 2],
    ports: PortWindows,
) -> Result<(), Error> {
    let mut wants: [Vec<(u64, u64, Want)>; 3] = Default::default();
    let [low, high, io] = &mut wants;
    for (index, (_, body)) in functions.iter_mut().enumerate() {
        for bar in body.function().bars() {
            // In memory a page of its own for each: pages are what KVM maps.
            let (list, size) = match bar.kind {
                BarKind::Io => (&mut *io, bar.size),
                BarKind::Memory32 => (&mut *low, bar.size.max(PAGE_BYTES)),
                BarKind::Memory64 => (&mut *high, bar.size.max(PAGE_BYTES)),
            };
            list.push((size, size, Want::Bar(index, bar.index)));
        }
        if matches!(body, Body::Port(_)) {
            // So aligned that one BAR can have the whole window.
            let aligned = |size: u64| (size, 1 << size.checked_ilog2().unwrap_or(0), Want::Window(index));
            low.push(aligned(ports.memory_bytes));
            high.push(aligned(ports.prefetchable_bytes));
        }
    }
    let mut starts = vec![[0; 2]; functions.len()];
    let [window32, window64] = windows;
    let all = [window32, window64, layout::PORTS];
    for ((which, mut list), window) in wants.into_iter().enumerate().zip(all) {
        list.sort_by_key(|(_, alignment, _)| std::cmp::Reverse(*alignment));
        let mut next = window.start;
        for (size, alignment, want) in list {
            let full = || Error::Layout(format!("no room for {size:#x} bytes of devices' registers"));
            let base = next.checked_next_multiple_of(alignment).ok_or_else(full)?;
            if !window.holds(base, size) {
                return Err(full());
            }
            next = base + size;
            match want {
                Want::Bar(index, bar) => {
                    if let Some((_, body)) = functions.get_mut(index) {
                        let placed = body.function().place_bar(bar, base);
                        placed.map_err(|error| Error::Layout(error.to_string()))?;
                    }
                }
                Want::Window(index) => {
                    if let Some(start) = starts.get_mut(index).and_then(|starts| starts.get_mut(which)) {
                        *start = base;
                    }
                }
            }
        }
    }
    let all = functions.iter_mut().zip(starts);
    let ports_in_order = all.filter_map(|((_, body), starts)| match body {
        Body::Port(port) => Some((port, starts)),
        Body::Function(_) => None,
    });
    for (bus, (port, [memory, prefetchable])) in (1..).zip(ports_in_order) {
        let windows =
            [memory..memory + ports.memory_bytes, prefetchable..prefetchable + ports.prefetchable_bytes];
        port.place_windows(bus, windows).map_err(|error| Error::Layout(error.to_string()))?;
    }
    Ok(())
}
