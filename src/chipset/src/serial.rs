//! The first serial port: a 16550A at its usual place.

use std::{cell::Cell, convert::Infallible, io::Write};

use vm_superio::{
    Serial as Uart, Trigger,
    serial::{Error, SerialEvents},
};

/// First I/O port of COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Number of I/O ports, from [`SERIAL_PORT`].
pub const SERIAL_PORTS: u16 = 8;
/// The interrupt of COM1: edge-triggered, active high.
pub const SERIAL_GSI: u8 = 4;

/// A 16550A whose output goes to `W`.
///
/// The guest's thread writes each byte to `W` and flushes it, so `W` decides whether a guest can be held up by a
/// slow reader: give a writer that does not block. A byte that it refuses is dropped and counted, as a line without
/// flow control would lose it.
pub struct Serial<W: Write> {
    uart: Uart<Interrupt, Losses, W>,
    /// The transmitter has become empty, and the guest was told of something else.
    is_empty_untold: bool,
}

struct Interrupt(Box<dyn Fn() + Send>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        (self.0)();
        Ok(())
    }
}

#[derive(Default)]
struct Losses(Cell<u64>);

impl SerialEvents for Losses {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {
        self.0.set(self.0.get().saturating_add(1));
    }
    fn in_buffer_empty(&self) {}
}

/// Registers, and of their bits those that tell of received data and of a transmitter that is empty (16550D data sheet, table II).
const IER: u8 = 1;
const IER_RECEIVED: u8 = 1;
const IER_EMPTY: u8 = 1 << 1;
const IIR: u16 = 2;
const IIR_NONE: u8 = 1;
const IIR_EMPTY: u8 = 0b010;
const IIR_RECEIVED: u8 = 0b100;
const IIR_MASK: u8 = 0b1111;
const LCR: u8 = 3;
const LCR_DIVISOR: u8 = 1 << 7;
const LSR: u8 = 5;
const LSR_RECEIVED: u8 = 1;

impl<W: Write> Serial<W> {
    /// A port that writes to `output` and calls `interrupt` for each edge of its interrupt line.
    ///
    /// `interrupt` is called with the port borrowed: it must not come back to it.
    pub fn new(output: W, interrupt: impl Fn() + Send + 'static) -> Self {
        let uart = Uart::with_events(Interrupt(Box::new(interrupt)), Losses::default(), output);
        Self { uart, is_empty_untold: false }
    }

    /// Reads the register at `offset` from [`SERIAL_PORT`], once for each byte of `data`.
    pub fn read(&mut self, offset: u16, data: &mut [u8]) {
        for byte in data {
            *byte = match offset {
                IIR => self.interrupt_identification(),
                _ => u8::try_from(offset).map_or(0, |offset| self.uart.read(offset)),
            };
        }
    }

    /// What the guest is told of pending interrupts, of which vm-superio knows less than a 16550. It forgets received data at the first byte
    /// that is read, and a guest that pauses after some (Linux: after 256) would leave the rest where it is, for ever when the FIFO is full.
    /// It tells that the transmitter is empty even when the guest doesn't want to know any more, and Linux, which says so behind the last
    /// byte of a line, would look at everything once more. And of both at once it makes a third thing, and forgets them.
    fn interrupt_identification(&mut self) -> u8 {
        let told = self.uart.read(IIR as u8);
        let enabled = self.interrupts_enabled();
        self.is_empty_untold |= told & IIR_NONE == 0 && told & IIR_EMPTY != 0;
        self.is_empty_untold &= enabled & IER_EMPTY != 0;
        let pending = if enabled & IER_RECEIVED != 0 && self.uart.read(LSR) & LSR_RECEIVED != 0 {
            IIR_RECEIVED
        } else if std::mem::take(&mut self.is_empty_untold) {
            IIR_EMPTY
        } else {
            IIR_NONE
        };
        told & !IIR_MASK | pending
    }

    /// The register of enabled interrupts, also while the divisor is in its place. Writing the line's settings does nothing else.
    fn interrupts_enabled(&mut self) -> u8 {
        let line = self.uart.read(LCR);
        let _ = self.uart.write(LCR, line & !LCR_DIVISOR);
        let enabled = self.uart.read(IER);
        let _ = self.uart.write(LCR, line);
        enabled
    }

    /// Writes the register at `offset` from [`SERIAL_PORT`], once with each byte of `data` (as `rep outsb` does).
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        for byte in data {
            match self.uart.write(offset, *byte) {
                // A lost byte is counted by `Losses`; the others cannot come from a write.
                Ok(()) | Err(Error::IOError(_) | Error::FullFifo) => {}
                Err(Error::Trigger(never)) => match never {},
            }
        }
    }

    /// Gives the guest input to read and tells how many bytes of it were taken: as many as the receive FIFO of 64
    /// bytes has room for, none while the guest has the port in loopback. The rest is the caller's to offer again.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        self.uart.enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// How many bytes of output were lost because the writer refused them.
    pub fn lost_bytes(&self) -> u64 {
        self.uart.events().0.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{
        io,
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
    };

    const DATA: u16 = 0;
    const IER: u16 = super::IER as u16;
    const LSR: u16 = super::LSR as u16;

    fn read(serial: &mut Serial<impl Write>, offset: u16) -> u8 {
        let mut byte = [0xee];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn received_data_are_pending_until_the_last_is_read() {
        let mut serial = Serial::new(io::sink(), || ());
        serial.write(IER, &[IER_RECEIVED]);
        assert_eq!(serial.enqueue(b"abc"), 3);
        for expected in *b"abc" {
            assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_RECEIVED);
            assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_RECEIVED, "asking does not clear it");
            assert_eq!(read(&mut serial, DATA), expected);
        }
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_NONE);
        serial.write(IER, &[0]);
        serial.enqueue(b"d");
        assert_eq!(
            read(&mut serial, IIR) & IIR_MASK,
            IIR_NONE,
            "a guest that does not want to know is not told"
        );
    }

    #[test]
    fn output_reaches_the_writer_and_input_interrupts() {
        let edges = Arc::new(AtomicU32::new(0));
        let count = edges.clone();
        let mut serial = Serial::new(Vec::new(), move || _ = count.fetch_add(1, Ordering::Relaxed));
        serial.write(DATA, b"hello");
        assert_eq!(serial.uart.writer(), b"hello");
        assert_eq!(edges.load(Ordering::Relaxed), 0, "the guest has not enabled interrupts");

        serial.write(IER, &[1]);
        assert_eq!(serial.enqueue(b"ab"), 2);
        assert_eq!(edges.load(Ordering::Relaxed), 1);
        assert_eq!(read(&mut serial, LSR) & 1, 1);
        assert_eq!([read(&mut serial, DATA), read(&mut serial, DATA)], *b"ab");
        assert_eq!(read(&mut serial, LSR) & 1, 0);
    }

    #[test]
    fn a_transmitter_is_told_empty_only_who_wants_to_know() {
        let mut serial = Serial::new(io::sink(), || ());
        serial.write(IER, &[IER_EMPTY]);
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_EMPTY, "it is empty when the guest begins to ask");
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_NONE, "telling clears it");
        serial.write(DATA, b"a");
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_EMPTY);
        serial.write(DATA, b"b");
        serial.write(IER, &[IER_RECEIVED]);
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_NONE);
        serial.write(LCR.into(), &[LCR_DIVISOR]);
        serial.write(DATA, b"d");
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_NONE, "the divisor's bits are no interrupts");
    }

    #[test]
    fn of_two_things_each_is_told() {
        let mut serial = Serial::new(io::sink(), || ());
        serial.write(IER, &[IER_EMPTY | IER_RECEIVED]);
        serial.enqueue(b"c");
        serial.write(DATA, b"d");
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_RECEIVED);
        assert_eq!(read(&mut serial, DATA), b'c');
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_EMPTY);
        assert_eq!(read(&mut serial, IIR) & IIR_MASK, IIR_NONE);
    }

    #[test]
    fn input_is_bounded() {
        let mut serial = Serial::new(io::sink(), || {});
        assert_eq!(serial.enqueue(&[b'x'; 100]), 64);
        assert_eq!(serial.enqueue(b"y"), 0);
    }

    #[test]
    fn a_writer_that_would_block_loses_bytes_and_nothing_else() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::WouldBlock.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut serial = Serial::new(Full, || {});
        serial.write(DATA, b"abc");
        assert_eq!(serial.lost_bytes(), 3);
        assert_eq!(read(&mut serial, LSR) & 0x60, 0x60, "the transmitter still reads as empty");
    }

    proptest! {
        #[test]
        fn never_panics(accesses in prop::collection::vec((any::<bool>(), 0u16..300, prop::collection::vec(any::<u8>(), 0..5)), 0..200)) {
            let mut serial = Serial::new(io::sink(), || {});
            for (write, offset, mut data) in accesses {
                if write { serial.write(offset, &data) } else { serial.read(offset, &mut data) }
                serial.enqueue(&data);
                prop_assert!(serial.uart.fifo_capacity() <= 64);
            }
        }
    }
}
