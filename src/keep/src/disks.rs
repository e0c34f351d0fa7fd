//! A guest's disks, as they can be made larger or smaller while it runs.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    path::PathBuf,
};

use casemate_spec::{DiskFormat, Guest, Refusal};
use casemate_wire::Ask;

use crate::{DeviceName, Paths, images::Images, operator::Operator, record};

/// The unit of a virtio disk (virtio 1.3, 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// The disks that one guest started with.
#[derive(Default)]
pub(crate) struct Disks {
    files: Vec<File>,
    /// Which of them are raw: the size of another is in its image, which is the cell's to write.
    raw: Vec<bool>,
}

/// A disk that may get another size.
pub(crate) struct Resizable {
    /// Which.
    pub(crate) name: DeviceName,
    /// Its image.
    pub(crate) file: File,
    /// Of one in a slot, where the image lies.
    pub(crate) path: Option<PathBuf>,
}

impl Disks {
    /// The disks that a guest was given.
    pub(crate) fn of(guest: &Guest, images: &Images) -> Result<Self, Refusal> {
        let copies = images.disks.iter().map(|image| image.fd.try_clone().map(File::from));
        let files = copies.collect::<io::Result<Vec<File>>>().map_err(|error| {
            let cause = format_args!("its disks cannot be kept open: {error}");
            Refusal::new("keep-failed", &guest.name, cause, "try again")
        })?;
        let raw = guest.disks.iter().map(|disk| disk.format == DiskFormat::Raw).collect();
        Ok(Self { files, raw })
    }

    /// The disk of this number.
    ///
    /// # Errors
    /// `disk-resize` when there is none, or its size isn't the host's to change.
    pub(crate) fn resizable(&self, guest: &str, number: u16) -> Result<Resizable, Refusal> {
        let name = DeviceName::Number(number);
        let Some(file) = self.files.get(usize::from(number)) else {
            return Err(refuse(
                guest,
                name,
                "the guest has no such disk",
                "count from 0, in the order of its file",
            ));
        };
        if self.raw.get(usize::from(number)) == Some(&false) {
            let cause = "only a raw disk can be resized while its guest runs";
            return Err(refuse(guest, name, cause, "stop the guest; then: qemu-img resize FILE SIZE"));
        }
        let file = file.try_clone().map_err(|error| refuse(guest, name, error, "try again"))?;
        Ok(Resizable { name, file, path: None })
    }
}

/// That a disk doesn't get another size.
pub(crate) fn refuse(guest: &str, name: DeviceName, cause: impl std::fmt::Display, remedy: &str) -> Refusal {
    Refusal::new("disk-resize", format_args!("disk {name} of {guest}"), cause, remedy)
}

impl Resizable {
    /// How large its file is now.
    pub(crate) fn size_bytes(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    /// Makes the file as large as `wanted`, or leaves it as it is by now, and tells the guest. Returns the size.
    ///
    /// # Errors
    /// `disk-resize`, and what the guest's VMM refuses with.
    pub(crate) fn resize(
        &self,
        paths: &Paths,
        operator: &Operator,
        wanted: Option<u64>,
        shrink: bool,
    ) -> Result<u64, Refusal> {
        let guest = operator.guest();
        let failed = |error: io::Error| {
            refuse(
                guest,
                self.name,
                error,
                "only a file that the guest may write to is made larger or smaller here; grow others first, and leave the size out",
            )
        };
        let now = self.size_bytes().map_err(failed)?;
        let size_bytes = wanted.unwrap_or(now);
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            let cause = format!("{size_bytes} is not a size that a disk can have");
            return Err(refuse(guest, self.name, cause, "use a multiple of 512 bytes"));
        }
        if size_bytes < now && !shrink {
            let cause = "what is beyond the new size would be lost";
            let remedy = "shrink the file system in the guest first, and then say --shrink";
            return Err(refuse(guest, self.name, cause, remedy));
        }
        if size_bytes > now {
            self.file.set_len(size_bytes).map_err(failed)?;
        }
        record::allow_file_size(paths, guest, size_bytes)?;
        operator.ask(Ask::ResizeDisk { disk: self.name.which(), size_bytes }, Vec::new())?;
        // Only now: the guest must not use what is no longer there.
        if size_bytes < now {
            self.file.set_len(size_bytes).map_err(failed)?;
        }
        Ok(size_bytes)
    }
}
