//! A guest's disks, as they can be made larger or smaller while it runs.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    sync::{Mutex, PoisonError},
};

use casemate_spec::{DiskFormat, Guest, Refusal};
use casemate_wire::Ask;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::{Paths, cell::Started, images::Images, operator::Operator, record};

/// The unit of a virtio disk (virtio 1.3, 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// The disks of one guest, and the process that uses them.
#[derive(Default)]
pub(crate) struct Disks {
    paths: Option<Paths>,
    files: Vec<File>,
    /// Which of them are raw: the size of another is in its image, which is the cell's to write.
    raw: Vec<bool>,
    cell: Option<Pid>,
    /// The largest file that the cell may write; held while a disk is resized.
    most_bytes: Mutex<u64>,
}

impl Disks {
    /// The disks that a guest was given.
    pub(crate) fn of(
        paths: &Paths,
        guest: &Guest,
        images: &Images,
        started: &Started,
    ) -> Result<Self, Refusal> {
        let copies = images.disks.iter().map(|image| image.fd.try_clone().map(File::from));
        let files = copies.collect::<io::Result<Vec<File>>>().map_err(|error| {
            let cause = format_args!("its disks cannot be kept open: {error}");
            Refusal::new("keep-failed", &guest.name, cause, "try again")
        })?;
        let raw = guest.disks.iter().map(|disk| disk.format == DiskFormat::Raw).collect();
        let cell = i32::try_from(started.cell.pid()).ok().and_then(Pid::from_raw);
        let most_bytes = Mutex::new(started.rlimits.file_size_bytes_max);
        Ok(Self { paths: Some(paths.clone()), files, raw, cell, most_bytes })
    }

    /// How large the file of a raw disk is now.
    pub(crate) fn size_bytes(&self, number: u16) -> Option<u64> {
        let place = usize::from(number);
        let mut file = self.files.get(place).filter(|_| self.raw.get(place) == Some(&true))?;
        file.seek(SeekFrom::End(0)).ok()
    }

    /// Makes the file of disk `number` as large as `wanted`, or leaves it as it is by now, and tells the guest. Returns
    /// the size.
    ///
    /// # Errors
    /// `disk-resize`, and what the guest's VMM refuses with.
    pub(crate) fn resize(
        &self,
        operator: &Operator,
        number: u16,
        wanted: Option<u64>,
        shrink: bool,
    ) -> Result<u64, Refusal> {
        let subject = format!("disk {number} of {}", operator.guest());
        let refuse = |cause: &dyn std::fmt::Display, remedy: &str| {
            Refusal::new("disk-resize", &subject, cause, remedy)
        };
        let failed = |error: io::Error| {
            refuse(
                &error,
                "only a file that the guest may write to is made larger or smaller here; grow others first, and leave the size out",
            )
        };
        let Some(mut file) = self.files.get(usize::from(number)) else {
            return Err(refuse(&"the guest has no such disk", "count from 0, in the order of its file"));
        };
        if self.raw.get(usize::from(number)) == Some(&false) {
            let cause = "only a raw disk can be resized while its guest runs";
            return Err(refuse(&cause, "stop the guest; then: qemu-img resize FILE SIZE"));
        }
        let mut most_bytes = self.most_bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let now = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let size_bytes = wanted.unwrap_or(now);
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            let cause = format!("{size_bytes} is not a size that a disk can have");
            return Err(refuse(&cause, "use a multiple of 512 bytes"));
        }
        if size_bytes < now && !shrink {
            let cause = "what is beyond the new size would be lost";
            return Err(refuse(&cause, "shrink the file system in the guest first, and then say --shrink"));
        }
        if size_bytes > now {
            file.set_len(size_bytes).map_err(failed)?;
        }
        if size_bytes > *most_bytes {
            self.allow(operator.guest(), size_bytes).map_err(failed)?;
            *most_bytes = size_bytes;
        }
        operator.ask(Ask::ResizeDisk { number, size_bytes }, Vec::new())?;
        // Only now: the guest must not use what is no longer there.
        if size_bytes < now {
            file.set_len(size_bytes).map_err(failed)?;
        }
        Ok(size_bytes)
    }

    /// Lets the cell write files of this size, and has it written down, as all that a cell may.
    fn allow(&self, guest: &str, size_bytes: u64) -> io::Result<()> {
        let (Some(cell), Some(paths)) = (self.cell, &self.paths) else { return Ok(()) };
        let limit = Rlimit { current: Some(size_bytes), maximum: Some(size_bytes) };
        prlimit(Some(cell), Resource::Fsize, limit)?;
        record::note_file_size(paths, guest, size_bytes)
    }
}
