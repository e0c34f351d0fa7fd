use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use proptest::prelude::*;

use super::*;
use crate::MsiMessage;

/// Delivers to nobody.
struct Nobody;

impl VectorSink for Nobody {
    fn set(&mut self, _vector: u16, _message: Option<MsiMessage>) {}
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

const MEMORY: Range<u64> = 0xc010_0000..0xc090_0000;
const PREFETCHABLE: Range<u64> = 0x10_4000_0000..0x10_8000_0000;

fn port() -> (RootPort, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&count);
    let interrupt = Box::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let mut port = RootPort::new(3, Box::new(Nobody), interrupt).unwrap();
    port.place_windows(7, [MEMORY, PREFETCHABLE]).unwrap();
    (port, count)
}

fn read(port: &mut RootPort, offset: u16) -> u32 {
    let mut data = [0; 4];
    port.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// Where the guest finds a capability, by the list.
fn capability(port: &mut RootPort, id: u8) -> u16 {
    let mut at = read(port, regs::CAPABILITY_LIST) as u8;
    while at != 0 {
        let [found, next, ..] = read(port, at.into()).to_le_bytes();
        if found == id {
            return at.into();
        }
        at = next;
    }
    panic!("no capability {id:#x}");
}

/// Does something to a port, and has it tell.
fn act(port: &mut RootPort, act: impl FnOnce(&mut RootPort)) {
    act(port);
    port.tell();
}

/// As Linux's pciehp: MSI-X on, all that it wants to hear of enabled, indicator off.
fn listen(port: &mut RootPort) -> u16 {
    let msix = capability(port, regs::CAP_ID_MSIX);
    port.config_write(msix + 2, &[0x00, 0x80]);
    let express = capability(port, regs::CAP_ID_EXP);
    act(port, |port| port.config_write(express + SLOT_CONTROL as u16, &[0x21 | 0x08, 0x13]));
    express
}

#[test]
fn is_a_bridge_with_a_slot() {
    let (mut port, _) = port();
    assert_eq!(read(&mut port, regs::REVISION_ID) >> 8, 0x06_04_00);
    assert_eq!(read(&mut port, regs::CACHE_LINE_SIZE).to_le_bytes()[2], 1);
    assert_eq!(read(&mut port, regs::PRIMARY_BUS), 0x0007_0700);
    let express = capability(&mut port, regs::CAP_ID_EXP);
    assert_eq!(read(&mut port, express) >> 16, 0x0142);
    let slot = read(&mut port, express + SLOT_CAPABILITIES as u16);
    assert_eq!((slot >> 19, slot & 1 << 6 != 0, slot & 1 << 1), (3, true, 0), "no power controller");
    assert!(RootPort::new(0, Box::new(Nobody), Box::new(|| {})).is_err());
    assert!(RootPort::new(8192, Box::new(Nobody), Box::new(|| {})).is_err());
}

#[test]
fn has_no_window_for_ports() {
    let (mut port, _) = port();
    port.config_write(0x1c, &[0xf0, 0xe0]);
    assert_eq!(read(&mut port, 0x1c) & 0xffff, 0);
}

#[test]
fn forwards_what_it_was_told_to() {
    let (mut port, _) = port();
    assert_eq!(port.forwarding().windows, [None, None], "memory decoding is off");
    port.config_write(regs::COMMAND, &regs::COMMAND_MEMORY.to_le_bytes());
    let inclusive = |range: Range<u64>| Some(range.start..=range.end - 1);
    let expected = Forwarding {
        buses: Some(7..=7),
        windows: [inclusive(MEMORY), inclusive(PREFETCHABLE)],
        reset: false,
    };
    assert_eq!(port.forwarding(), expected);
    port.config_write(regs::BRIDGE_CONTROL, &regs::BRIDGE_CONTROL_BUS_RESET.to_le_bytes());
    assert_eq!(port.forwarding(), Forwarding { reset: true, ..Forwarding::default() });
    port.config_write(regs::BRIDGE_CONTROL, &[0, 0]);
    assert_eq!(port.forwarding(), expected);
    // Linux closes a window so.
    port.config_write(regs::MEMORY_BASE, &0x0000_fff0u32.to_le_bytes());
    port.config_write(regs::SECONDARY_BUS, &[9, 8]);
    let closed = port.forwarding();
    assert_eq!((closed.buses, &closed.windows[0]), (None, &None));
}

#[test]
fn windows_that_a_bridge_cannot_have_are_refused() {
    let (mut port, _) = port();
    for memory in [0..0, 0x1000..0x20_0000, 0x10_0000..0x10_1000, 0xfff0_0000..0x1_0010_0000] {
        let refused = port.place_windows(1, [memory.clone(), PREFETCHABLE]);
        assert_eq!(refused, Err(ConfigError::BridgeWindow { start: memory.start, end: memory.end }));
    }
    assert_eq!(read(&mut port, regs::PRIMARY_BUS), 0x0007_0700, "nothing has changed");
}

#[test]
fn a_card_is_told_of_once() {
    let (mut port, count) = port();
    let express = listen(&mut port);
    let status = express + SLOT_CONTROL as u16;
    act(&mut port, |port| port.set_card(true));
    act(&mut port, |port| port.set_card(true));
    assert_eq!(count.load(Ordering::Relaxed), 1);
    assert_eq!(read(&mut port, status) >> 16, u32::from(CARD_PRESENT | PRESENCE_CHANGED | LINK_CHANGED));
    assert_ne!(read(&mut port, express + LINK_CONTROL as u16) >> 16 & u32::from(LINK_ACTIVE), 0);
    // One of two events acknowledged: the port stays silent until both are.
    act(&mut port, |port| port.config_write(status + 2, &PRESENCE_CHANGED.to_le_bytes()));
    act(&mut port, RootPort::press_button);
    assert_eq!(count.load(Ordering::Relaxed), 1);
    act(&mut port, |port| port.config_write(status + 2, &[0xff; 2]));
    assert_eq!(read(&mut port, status) >> 16, u32::from(CARD_PRESENT), "the guest cannot move the card");
    act(&mut port, RootPort::press_button);
    assert_eq!(count.load(Ordering::Relaxed), 2);
}

#[test]
fn an_event_from_before_the_guest_listened_is_not_lost() {
    let (mut port, count) = port();
    act(&mut port, |port| port.set_card(true));
    assert_eq!(count.load(Ordering::Relaxed), 0);
    listen(&mut port);
    assert_eq!(count.load(Ordering::Relaxed), 1);
}

#[test]
fn the_indicator_says_when_the_card_may_go() {
    let (mut port, _) = port();
    let control = listen(&mut port) + SLOT_CONTROL as u16;
    port.set_card(true);
    port.config_write(control, &[0x21, 0x11]);
    assert!(!port.let_go(), "on");
    port.config_write(control, &[0x21, 0x12]);
    assert!(!port.let_go() && port.is_undecided(), "blinking");
    port.config_write(control, &[0x21, 0x13]);
    assert!(port.let_go());
    port.config_write(control, &[0x21, 0x11]);
    port.set_card(false);
    assert!(port.let_go() && !port.has_card(), "an empty slot is dark");
}

#[test]
fn a_reset_leaves_the_card_where_it_is() {
    let (mut port, _) = port();
    listen(&mut port);
    port.set_card(true);
    port.reset();
    assert!(port.has_card() && !port.msix.enabled());
    assert_eq!(port.forwarding(), Forwarding::default());
}

proptest! {
    #[test]
    fn no_write_moves_the_card_or_makes_a_window_that_is_none(
        writes in proptest::collection::vec((0u16..0x100, any::<[u8; 8]>(), 0usize..9, 0u8..8), 1..80),
    ) {
        let (mut port, _) = port();
        let mut card = false;
        for (offset, data, length, act) in writes {
            match act {
                0 => {
                    card = !card;
                    port.set_card(card);
                }
                1 => port.press_button(),
                2 => port.bar_write(0, offset.into(), &data[..length]),
                _ => port.config_write(offset, &data[..length]),
            }
            port.tell();
            prop_assert_eq!(port.has_card(), card);
            prop_assert_eq!(read(&mut port, regs::VENDOR_ID), 0x000c_1b36);
            let forwarding = port.forwarding();
            for window in forwarding.windows.iter().flatten() {
                prop_assert!(window.start().is_multiple_of(BRIDGE_WINDOW_BYTES) && window.start() < window.end());
            }
            prop_assert!(forwarding.buses.is_none_or(|buses| *buses.start() > 0 && buses.start() <= buses.end()));
        }
    }
}
