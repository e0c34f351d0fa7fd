//! The files that a guest uses: opened, locked, and seen to be what they are to be.

use std::path::Path;

use casemate_broker::{What, hands};
use casemate_host::Image;
use casemate_spec::{Backing, DiskFormat, Located, PciAddress, Refusal};

use crate::digest;

/// The images that a guest uses, opened.
pub(crate) struct Images {
    pub(crate) kernel: Image,
    pub(crate) initrd: Option<Image>,
    pub(crate) disks: Vec<Image>,
    /// What lies under each of the disks.
    pub(crate) backings: Vec<Option<Image>>,
    /// The option ROMs of its devices, sealed, each with its device.
    pub(crate) roms: Vec<(PciAddress, Image)>,
}

impl Images {
    /// Opens all that the guest's file names.
    ///
    /// # Errors
    /// Each with where it stands in the file.
    pub(crate) fn open(located: &Located) -> Result<Self, Refusal> {
        let guest = &located.guest;
        let at = |key: &str| located.location(key);
        let kernel = hands::open(What::Kernel, &located.resolve(&guest.boot.kernel))
            .map_err(|refusal| refusal.at(at("boot.kernel")))?;
        let initrd = guest.boot.initrd.as_deref().map(|path| {
            hands::open(What::Initrd, &located.resolve(path)).map_err(|refusal| refusal.at(at("boot.initrd")))
        });
        let disks = guest.disks.iter().enumerate().map(|(index, disk)| {
            open_disk(located, &disk.path, disk.format, disk.read_only)
                .map_err(|refusal| refusal.at(at(&format!("disk[{index}].path"))))
        });
        let disks = disks.collect::<Result<_, _>>()?;
        let backings = guest.disks.iter().enumerate().map(|(index, disk)| {
            let open = |backing: &Backing| open_disk(located, &backing.path, backing.format, true);
            disk.backing
                .as_ref()
                .map(open)
                .transpose()
                .map_err(|refusal| refusal.at(at(&format!("disk[{index}].backing"))))
        });
        let backings = backings.collect::<Result<_, _>>()?;
        let roms = guest.devices.iter().filter_map(|device| Some((device, device.rom.as_ref()?)));
        let roms = roms.map(|(device, rom)| {
            let open = || {
                let mut image = hands::open(What::Rom, &located.resolve(&rom.path))?;
                digest::seal_rom(&mut image, &rom.sha256)?;
                Ok((device.address, image))
            };
            open().map_err(|refusal: Refusal| refusal.at(located.device_location(device.table)))
        });
        let roms = roms.collect::<Result<_, _>>()?;
        Ok(Self { kernel, initrd: initrd.transpose()?, disks, backings, roms })
    }
}

fn open_disk(located: &Located, path: &Path, format: DiskFormat, read_only: bool) -> Result<Image, Refusal> {
    let path = located.resolve(path);
    match format {
        DiskFormat::Raw => hands::open(What::Raw { read_only }, &path),
        DiskFormat::Qcow2 => hands::open(What::Qcow2 { read_only }, &path),
    }
}
