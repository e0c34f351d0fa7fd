//! MSI: messages whose address and data stand in configuration space (PCI Local Bus Specification 3.0, section 6.8.1;
//! PCI Express Base Specification 5.0, section 7.7.1).

use crate::{Capability, Config, ConfigError, MsiMessage, VectorSink, regs};

/// Vectors that one function can have at most.
pub const MSI_VECTORS_MAX: u16 = 32;

const CONTROL_ENABLE: u16 = 1 << 0;
const CONTROL_CAPABLE_SHIFT: u16 = 1;
const CONTROL_ENABLED_SHIFT: u16 = 4;
const CONTROL_COUNT_MASK: u16 = 7;
const CONTROL_64_BITS: u16 = 1 << 7;
const CONTROL_MASKABLE: u16 = 1 << 8;

/// What of MSI a function has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiLayout {
    /// Vectors: a power of two, 1 to [`MSI_VECTORS_MAX`].
    pub vectors: u16,
    /// Addresses of 64 bits.
    pub wide: bool,
    /// A mask and a pending bit for each vector.
    pub maskable: bool,
    /// Where the capability has to stand, or `None` for the next free place.
    pub capability_at: Option<u8>,
}

impl MsiLayout {
    /// As a capability's message control says it; `None` when its number of vectors is reserved.
    pub fn from_control(control: u16, capability_at: Option<u8>) -> Option<Self> {
        let vectors = 1 << (control >> CONTROL_CAPABLE_SHIFT & CONTROL_COUNT_MASK);
        let (wide, maskable) = (control & CONTROL_64_BITS != 0, control & CONTROL_MASKABLE != 0);
        (vectors <= MSI_VECTORS_MAX).then_some(Self { vectors, wide, maskable, capability_at })
    }

    /// Bytes of the capability, with ID and link.
    pub fn size(&self) -> u16 {
        let message = if self.wide { 14 } else { 10 };
        if self.maskable { message + 10 } else { message }
    }

    fn data_at(&self) -> u16 {
        if self.wide { 12 } else { 8 }
    }

    fn mask_at(&self) -> Option<u16> {
        self.maskable.then(|| self.data_at() + 4)
    }

    fn all_vectors(&self) -> u32 {
        u32::MAX.checked_shr(u32::from(MSI_VECTORS_MAX.saturating_sub(self.vectors))).unwrap_or(0)
    }
}

/// What a configuration write did to MSI as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsiTransition {
    /// It is on now, with so many vectors; or it was, with another number.
    Enabled(u16),
    /// It is off now.
    Disabled,
}

/// The MSI state of one function.
#[derive(Debug)]
pub struct Msi {
    layout: MsiLayout,
    capability: u16,
    /// How many vectors are on; 0 when MSI is off.
    enabled: u16,
    /// What the sink was told last of each vector.
    told: Vec<Option<MsiMessage>>,
}

impl Msi {
    /// Adds the capability to `config`. It starts off, with no vector masked.
    ///
    /// # Errors
    /// [`ConfigError::Msi`] when the number of vectors can't be, or [`ConfigError::CapabilityPlace`].
    pub fn add(config: &mut Config, layout: MsiLayout) -> Result<Self, ConfigError> {
        if !layout.vectors.is_power_of_two() || layout.vectors > MSI_VECTORS_MAX {
            return Err(ConfigError::Msi(layout.vectors));
        }
        let capable = u16::try_from(layout.vectors.trailing_zeros()).unwrap_or(0) << CONTROL_CAPABLE_SHIFT;
        let flag = |has: bool, bit: u16| if has { bit } else { 0 };
        let control = capable | flag(layout.wide, CONTROL_64_BITS) | flag(layout.maskable, CONTROL_MASKABLE);
        let writable_control = CONTROL_ENABLE | CONTROL_COUNT_MASK << CONTROL_ENABLED_SHIFT;
        let mut body = control.to_le_bytes().to_vec();
        let mut writable = writable_control.to_le_bytes().to_vec();
        // A message is a dword; the two lowest bits of its address are 0.
        writable.extend(0xffff_fffcu32.to_le_bytes());
        writable.extend(layout.wide.then_some([0xff; 4]).into_iter().flatten());
        writable.extend([0xff; 2]);
        if layout.maskable {
            writable.extend([0; 2]);
            writable.extend(layout.all_vectors().to_le_bytes());
        }
        body.resize(usize::from(layout.size() - 2), 0);
        let capability = config.add_capability(Capability {
            id: regs::CAP_ID_MSI,
            at: layout.capability_at,
            body: &body,
            writable: &writable,
            clear: &[],
        })?;
        let told = vec![None; layout.vectors.into()];
        Ok(Self { layout, capability: capability.into(), enabled: 0, told })
    }

    /// The layout it was made with.
    pub fn layout(&self) -> &MsiLayout {
        &self.layout
    }

    /// To be called after each guest write to `config`: tells the sink what changed, and returns whether MSI as a whole went
    /// on or off, or on with another number of vectors.
    pub fn config_written(&mut self, config: &Config, sink: &mut dyn VectorSink) -> Option<MsiTransition> {
        let control = config.u16_at(self.capability + 2);
        let count = match control & CONTROL_ENABLE {
            0 => 0,
            // Who asks for more than there is gets what there is.
            _ => (1u16 << (control >> CONTROL_ENABLED_SHIFT & CONTROL_COUNT_MASK)).min(self.layout.vectors),
        };
        let message = self.message(config);
        let mask = self.layout.mask_at().map_or(0, |at| config.u32_at(self.capability + at));
        for (vector, told) in (0u16..).zip(&mut self.told) {
            let open = vector < count && mask >> vector & 1 == 0;
            // The function changes the lowest bits of the data to say which vector it is.
            let number = u32::from(vector);
            let data = message.data & !u32::from(count.saturating_sub(1)) | number;
            let now = open.then_some(MsiMessage { data, ..message });
            if *told != now {
                *told = now;
                sink.set(vector, now);
            }
        }
        if count == self.enabled {
            return None;
        }
        self.enabled = count;
        Some(if count == 0 { MsiTransition::Disabled } else { MsiTransition::Enabled(count) })
    }

    /// Whether the guest can see which vectors are pending, so that [`Msi::show_pending`] is of use.
    pub fn has_pending(&self) -> bool {
        self.layout.mask_at().is_some()
    }

    /// To be called before each guest read of `config`: brings the pending bits up to date. What is delivered at once is
    /// never pending.
    pub fn show_pending(&self, config: &mut Config, sink: &dyn VectorSink) {
        let Some(at) = self.layout.mask_at() else { return };
        let vectors = (0..self.enabled).zip(&self.told);
        let pending = vectors.filter(|(vector, told)| told.is_none() && sink.is_pending(*vector));
        let bits =
            pending.fold(0u32, |bits, (vector, _)| bits | 1u32.checked_shl(vector.into()).unwrap_or(0));
        config.set(self.capability + at + 4, &bits.to_le_bytes());
    }

    fn message(&self, config: &Config) -> MsiMessage {
        let low = config.u32_at(self.capability + 4);
        let high = if self.layout.wide { config.u32_at(self.capability + 8) } else { 0 };
        let data = config.u16_at(self.capability + self.layout.data_at());
        MsiMessage { address: u64::from(high) << 32 | u64::from(low), data: data.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Sink {
        now: [Option<MsiMessage>; 32],
        pending: u32,
        changes: usize,
    }

    impl VectorSink for Sink {
        fn set(&mut self, vector: u16, message: Option<MsiMessage>) {
            assert_ne!(self.now[usize::from(vector)], message, "changes only");
            self.now[usize::from(vector)] = message;
            self.changes += 1;
        }
        fn is_pending(&self, vector: u16) -> bool {
            self.pending >> vector & 1 != 0
        }
    }

    fn made(vectors: u16, wide: bool, maskable: bool) -> (Config, Msi, Sink) {
        let mut config = Config::new(Identity::default());
        let layout = MsiLayout { vectors, wide, maskable, capability_at: Some(0x50) };
        let msi = Msi::add(&mut config, layout).unwrap();
        (config, msi, Sink::default())
    }

    #[test]
    fn four_vectors_deliver_mask_and_pend() {
        let (mut config, mut msi, mut sink) = made(4, true, true);
        assert_eq!(config.u16_at(0x52), 0x0184);
        for (at, value) in [(0x54, 0xfee0_1007u32), (0x58, 1), (0x5c, 0x4023)] {
            config.write(at, &value.to_le_bytes());
            assert_eq!(msi.config_written(&config, &mut sink), None);
        }
        assert_eq!(sink.changes, 0, "nothing is told while it is off");
        config.write(0x52, &0x0021u16.to_le_bytes());
        assert_eq!(msi.config_written(&config, &mut sink), Some(MsiTransition::Enabled(4)));
        let data = |sink: &Sink| sink.now.map(|message| message.map(|message| message.data));
        assert_eq!(data(&sink)[..5], [Some(0x4020), Some(0x4021), Some(0x4022), Some(0x4023), None]);
        assert_eq!(sink.now[0].unwrap().address, 0x1_fee0_1004);

        config.write(0x60, &0xffff_ffffu32.to_le_bytes());
        assert_eq!(config.u32_at(0x60), 0xf, "only bits of vectors can be set");
        assert_eq!(msi.config_written(&config, &mut sink), None);
        assert_eq!(sink.now, [None; 32]);
        sink.pending = 0b1010;
        msi.show_pending(&mut config, &sink);
        assert_eq!(config.u32_at(0x64), 0b1010);
        config.write(0x64, &[0xff; 4]);
        assert_eq!(config.u32_at(0x64), 0b1010, "pending bits are not the guest's to write");
        config.write(0x60, &0b0010u32.to_le_bytes());
        msi.config_written(&config, &mut sink);
        msi.show_pending(&mut config, &sink);
        assert_eq!(config.u32_at(0x64), 0b0010);

        config.write(0x52, &0x0011u16.to_le_bytes());
        assert_eq!(msi.config_written(&config, &mut sink), Some(MsiTransition::Enabled(2)));
        config.write(0x52, &0u16.to_le_bytes());
        assert_eq!(msi.config_written(&config, &mut sink), Some(MsiTransition::Disabled));
        assert_eq!(sink.now, [None; 32]);
    }

    #[test]
    fn who_asks_for_more_gets_what_there_is() {
        let (mut config, mut msi, mut sink) = made(1, false, false);
        config.write(0x54, &0xfee0_0000u32.to_le_bytes());
        config.write(0x58, &0x31u16.to_le_bytes());
        config.write(0x52, &0x0071u16.to_le_bytes());
        assert_eq!(msi.config_written(&config, &mut sink), Some(MsiTransition::Enabled(1)));
        assert_eq!(sink.now[0], Some(MsiMessage { address: 0xfee0_0000, data: 0x31 }));
    }

    #[test]
    fn layouts_are_read_and_checked() {
        let layout = MsiLayout::from_control(0x0184, None).unwrap();
        assert_eq!((layout.vectors, layout.wide, layout.maskable, layout.size()), (4, true, true, 24));
        assert_eq!(MsiLayout::from_control(0x0000, None).map(|layout| layout.size()), Some(10));
        assert_eq!(MsiLayout::from_control(0x000c, None), None, "64 vectors");
        let mut config = Config::new(Identity::default());
        for vectors in [0, 3, 64] {
            let layout = MsiLayout { vectors, wide: true, maskable: false, capability_at: None };
            assert!(matches!(Msi::add(&mut config, layout), Err(ConfigError::Msi(_))));
        }
    }

    proptest! {
        /// Whatever a guest writes: what is told is a message of a vector that is on.
        #[test]
        fn any_writes(shift in 0u16..=5, wide: bool, maskable: bool,
            writes in prop::collection::vec((0x50u16..0x70, prop::collection::vec(any::<u8>(), 1..=4)), 0..64)) {
            let (mut config, mut msi, mut sink) = made(1 << shift, wide, maskable);
            for (at, data) in writes {
                config.write(at, &data);
                if let Some(MsiTransition::Enabled(count)) = msi.config_written(&config, &mut sink) {
                    prop_assert!(count.is_power_of_two() && count <= 1 << shift);
                }
                msi.show_pending(&mut config, &sink);
                for (vector, message) in sink.now.iter().enumerate() {
                    prop_assert!(message.is_none_or(|message| message.address % 4 == 0 && vector < usize::from(msi.enabled)));
                }
            }
        }
    }
}
