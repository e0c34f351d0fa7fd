//! Packets (`struct virtio_vsock_hdr`; virtio 1.3, 5.10.6).

pub(super) const HEADER_BYTES: usize = 44;
/// The host's name (5.10.4).
pub(super) const HOST_CID: u64 = 2;
pub(super) const TYPE_STREAM: u16 = 1;
/// Flags of a shutdown: nothing will be received, nothing will be sent.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// None that is known.
    Other,
}

const OPS: [(u16, Op); 7] = [
    (1, Op::Request),
    (2, Op::Response),
    (3, Op::Reset),
    (4, Op::Shutdown),
    (5, Op::Data),
    (6, Op::CreditUpdate),
    (7, Op::CreditRequest),
];

/// A packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source_cid: u64,
    pub(super) destination_cid: u64,
    pub(super) source_port: u32,
    pub(super) destination_port: u32,
    /// Bytes of data behind it.
    pub(super) length: u32,
    pub(super) kind: u16,
    pub(super) op: Op,
    pub(super) flags: u32,
    /// What the sender has room for.
    pub(super) buffer_bytes: u32,
    /// What it has taken out of that since the beginning, modulo 2^32.
    pub(super) forwarded: u32,
}

impl Header {
    pub(super) fn read(bytes: &[u8; HEADER_BYTES]) -> Self {
        let long = |at: usize| u64::from_le_bytes(part(bytes, at));
        let word = |at: usize| u32::from_le_bytes(part(bytes, at));
        let half = |at: usize| u16::from_le_bytes(part(bytes, at));
        let op = OPS.iter().find(|(number, _)| *number == half(30));
        Self {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            kind: half(28),
            op: op.map_or(Op::Other, |(_, op)| *op),
            flags: word(32),
            buffer_bytes: word(36),
            forwarded: word(40),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let op = OPS.iter().find(|(_, op)| *op == self.op).map_or(0, |(number, _)| *number);
        let parts = [
            &self.source_cid.to_le_bytes()[..],
            &self.destination_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.destination_port.to_le_bytes(),
            &self.length.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buffer_bytes.to_le_bytes(),
            &self.forwarded.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// Whether it comes from this guest and goes to the host; anything else has no way to go.
    pub(super) fn is_for_host(&self, cid: u32) -> bool {
        self.source_cid == u64::from(cid) && self.destination_cid == HOST_CID
    }

    /// The answer to one that can't be followed.
    pub(super) fn refusal(&self) -> Self {
        Self {
            source_cid: HOST_CID,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            length: 0,
            kind: self.kind,
            op: Op::Reset,
            flags: 0,
            buffer_bytes: 0,
            forwarded: 0,
        }
    }
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}
