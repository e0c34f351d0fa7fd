//! Why a machine could not be built or go on.

use std::io;

/// A refusal of the VMM's, with a stable code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// KVM or VFIO did not do what was asked.
    #[error("{what} failed: {source}")]
    Kernel {
        /// What was asked.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The host's KVM lacks something.
    #[error("this host's KVM lacks {0}")]
    Lacks(&'static str),
    /// The processors asked for cannot be had here.
    #[error("the processors cannot be had: {0}")]
    Processor(String),
    /// The kernel image was refused.
    #[error("the kernel image cannot be booted: {0}")]
    KernelImage(String),
    /// The initrd does not fit or cannot be read.
    #[error("the initrd cannot be loaded: {0}")]
    Initrd(String),
    /// The machine does not fit its address space or limits.
    #[error("the machine cannot be laid out: {0}")]
    Layout(String),
    /// A device could not be made.
    #[error("{device}: {cause}")]
    Device {
        /// Which device.
        device: String,
        /// Why.
        cause: String,
    },
    /// The control socket failed.
    #[error(transparent)]
    Wire(#[from] casemate_wire::WireError),
    /// What the keep sent cannot be a machine.
    #[error("the keep's message is wrong: {0}")]
    Message(String),
}

impl Error {
    /// The stable code that goes with the message.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Kernel { .. } => "vmm-kernel",
            Self::Lacks(_) => "vmm-kvm-lacks",
            Self::Processor(_) => "vmm-processor",
            Self::KernelImage(_) => "kernel-not-bootable",
            Self::Initrd(_) => "initrd-not-loadable",
            Self::Layout(_) => "vmm-layout",
            Self::Device { .. } => "vmm-device",
            Self::Wire(_) | Self::Message(_) => "vmm-message",
        }
    }

    /// A device's error.
    pub(crate) fn device(device: impl ToString, cause: impl ToString) -> Self {
        Self::Device { device: device.to_string(), cause: cause.to_string() }
    }
}

/// A text cut, at a character, to what the keep takes.
pub(crate) fn bounded(mut text: String) -> String {
    let end = (0..=casemate_wire::TEXT_BYTES.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    text
}

/// Names what was asked when the kernel refuses.
pub(crate) trait During<T> {
    /// The result with `what` in its error.
    fn during(self, what: &'static str) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Kernel { what, source: error.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_at_a_character() {
        assert_eq!(bounded("é".repeat(2000)).len(), casemate_wire::TEXT_BYTES);
        assert_eq!(bounded("ab".into()), "ab");
    }
}
