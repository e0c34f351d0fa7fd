//! The header in front of each frame (`struct virtio_net_hdr_v1`; virtio 1.3, 5.1.6): what is left to be done to it.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use crate::active::Active;

/// With num_buffers, as every frame has it since virtio 1.0.
pub(super) const HEADER_BYTES: usize = 12;

/// An Ethernet header; no checksum begins before its end.
const ETHERNET_BYTES: u16 = 14;
/// Least size of segments: less than any TCP announces (`TCP_MIN_SND_MSS`), so that one frame does not become thousands.
const SEGMENT_MIN_BYTES: u16 = 48;
/// The kernel's sign for something else (`GSO_BY_FRAGS`).
const SEGMENT_MAX_BYTES: u16 = 0xfffe;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const TCP_4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const TCP_6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;

// `linux/if_tun.h`.
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;

/// What one side may leave to the other, as negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offloads {
    checksum: bool,
    tcp_4: bool,
    tcp_6: bool,
}

impl Offloads {
    /// What the driver may leave to the host.
    pub(super) fn of_driver(active: &Active) -> Self {
        Self::of(active, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6)
    }

    /// What the tap may leave to the driver.
    pub(super) fn of_tap(active: &Active) -> Self {
        Self::of(active, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6)
    }

    /// Segmentation needs checksums (5.1.3.1).
    fn of(active: &Active, checksum: u32, tcp_4: u32, tcp_6: u32) -> Self {
        let checksum = active.has_feature(checksum);
        let tcp = |bit| checksum && active.has_feature(bit);
        Self { checksum, tcp_4: tcp(tcp_4), tcp_6: tcp(tcp_6) }
    }

    /// Whether frames may be longer than the MTU.
    pub(super) fn segments(self) -> bool {
        self.tcp_4 || self.tcp_6
    }

    /// As TUNSETOFFLOAD takes them.
    pub(super) fn flags(self) -> u32 {
        let flag = |on, flag| if on { flag } else { 0 };
        flag(self.checksum, TUN_F_CSUM) | flag(self.tcp_4, TUN_F_TSO4) | flag(self.tcp_6, TUN_F_TSO6)
    }

    /// The header with which a frame of `length` bytes goes to the tap. `None` when the driver's asks for what was not
    /// negotiated, or for nonsense.
    pub(super) fn header_out(self, driver: &[u8; HEADER_BYTES], length: usize) -> Option<[u8; HEADER_BYTES]> {
        let [flags, kind, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = *driver;
        let length = u32::try_from(length).ok()?;
        let mut header = [0; HEADER_BYTES];
        if flags & NEEDS_CSUM == 0 {
            // 5.1.6.2: who segments also needs a checksum.
            return (kind == NONE).then_some(header);
        }
        let (start, offset) = (u16::from_le_bytes([c0, c1]), u16::from_le_bytes([o0, o1]));
        let end = u32::from(start) + u32::from(offset) + 2;
        if !self.checksum || start < ETHERNET_BYTES || end > length {
            return None;
        }
        let size = u16::from_le_bytes([s0, s1]);
        let segments = match kind {
            NONE => false,
            TCP_4 if self.tcp_4 => true,
            TCP_6 if self.tcp_6 => true,
            _ => return None,
        };
        if segments && !(SEGMENT_MIN_BYTES..=SEGMENT_MAX_BYTES).contains(&size) {
            return None;
        }
        // A hint, and the kernel wants no more than there is.
        let hint = u32::from(u16::from_le_bytes([h0, h1])).min(length);
        let [h0, h1, ..] = hint.to_le_bytes();
        let size = if segments { [s0, s1] } else { [0, 0] };
        header = [NEEDS_CSUM, kind, h0, h1, size[0], size[1], c0, c1, o0, o1, 0, 0];
        Some(header)
    }

    /// The header with which a frame that the tap gave goes to the driver, in so many buffers.
    pub(super) fn header_in(self, tap: &[u8; HEADER_BYTES], buffers: u16) -> [u8; HEADER_BYTES] {
        let [n0, n1] = buffers.to_le_bytes();
        // 5.1.6.4.1: without the checksum offload all flags are 0.
        let mut header = if self.checksum { *tap } else { [0; HEADER_BYTES] };
        let [.., b0, b1] = &mut header;
        (*b0, *b1) = (n0, n1);
        header
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Offloads = Offloads { checksum: true, tcp_4: true, tcp_6: true };
    const NO: Offloads = Offloads { checksum: false, tcp_4: false, tcp_6: false };
    /// A TCP segment to be cut into parts of 1460 bytes: headers of 54 bytes, a checksum at 34 + 16.
    const SEGMENT: [u8; HEADER_BYTES] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 9, 9];

    #[test]
    fn passes_on_what_makes_sense() {
        let with = |at: usize, byte: u8| {
            let mut header = SEGMENT;
            header[at] = byte;
            ALL.header_out(&header, 4000)
        };
        assert_eq!(with(11, 9), Some([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]));
        assert_eq!(with(0, 0), None, "segments without a checksum");
        assert_eq!(with(1, 3), None, "UDP");
        assert_eq!(with(1, 0x81), None, "with ECN");
        assert_eq!(with(6, 13), None, "a checksum of the Ethernet header");
        assert_eq!(with(9, 0x40), None, "a checksum behind the end");
        assert_eq!(with(1, 0).map(|header| header[4..6].to_vec()), Some(vec![0, 0]));
        assert_eq!(ALL.header_out(&[1, 1, 54, 0, 47, 0, 34, 0, 16, 0, 0, 0], 4000), None, "tiny segments");
        assert_eq!(ALL.header_out(&[1, 1, 54, 0, 255, 255, 34, 0, 16, 0, 0, 0], 4000), None);
        assert_eq!(ALL.header_out(&SEGMENT, 51), None);
        assert_eq!(NO.header_out(&SEGMENT, 4000), None);
        assert_eq!(NO.header_out(&[0; HEADER_BYTES], 60), Some([0; HEADER_BYTES]));
        let only_4 = Offloads { tcp_6: false, ..ALL };
        assert_eq!(only_4.header_out(&[1, 4, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], 4000), None);
    }

    #[test]
    fn tells_the_driver_what_it_understands() {
        assert_eq!(ALL.header_in(&SEGMENT, 0x102)[..], [&SEGMENT[..10], &[2, 1]].concat());
        assert_eq!(NO.header_in(&SEGMENT, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!((ALL.flags(), NO.flags()), (7, 0));
    }

    proptest! {
        #[test]
        fn never_points_outside_the_frame(driver: [u8; HEADER_BYTES], length in 1usize..70_000) {
            if let Some([flags, kind, h0, h1, s0, s1, c0, c1, o0, o1, ..]) = ALL.header_out(&driver, length) {
                prop_assert!(flags <= 1 && matches!(kind, 0 | 1 | 4) && (kind == 0 || flags == 1));
                let word = |low, high| usize::from(u16::from_le_bytes([low, high]));
                prop_assert!(word(h0, h1) <= length);
                prop_assert!(flags == 0 || word(c0, c1) + word(o0, o1) + 2 <= length);
                prop_assert!(kind == 0 || word(s0, s1) >= 48);
            }
        }
    }
}
