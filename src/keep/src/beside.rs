//! Which guests run on this host, and what they have: each keep writes an account of its guest, and replaces it as a whole.
//!
//! A keep writes its own account before it reads those of others. So of two that start at once at least one sees the
//! other: together they can't take what only one may have, though both may be refused.

use std::{fs, io, path::Path};

use casemate_broker::{Kept, hands};
use casemate_host::{Host, Process};
use casemate_policy::{Amounts, Attrs, Neighbour};
use casemate_spec::{Guest, PciAddress};
use serde::{Deserialize, Serialize};

use crate::facts;

/// What a running guest has.
#[derive(Debug, Serialize, Deserialize)]
struct Account {
    guest: String,
    tenant: String,
    vcpus: u32,
    memory_bytes: u64,
    devices: Vec<PciAddress>,
    /// What policies are told of a guest besides.
    #[serde(default)]
    attrs: Attrs,
    /// The process that watches over it: an account whose process is gone is nobody's.
    keep: Process,
}

/// Writes a guest's account, whose name lock is held.
pub(crate) fn write(runtime: &Path, guest: &Guest) -> io::Result<()> {
    let keep = Process::with_pid(&Host::live(), std::process::id())
        .ok_or_else(|| io::Error::other("/proc does not tell about this process"))?;
    let account = Account {
        guest: guest.name.to_string(),
        tenant: guest.tenant.to_string(),
        vcpus: guest.vcpus.into(),
        memory_bytes: guest.memory.bytes(),
        devices: guest.devices.iter().map(|device| device.address).collect(),
        attrs: facts::guest(guest),
        keep,
    };
    hands::put(runtime, &guest.name, Kept::Account, &serde_json::to_string(&account)?)
}

/// The guests that run on this host, but for the one of this name.
pub(crate) fn read(runtime: &Path, but: &str) -> Vec<Neighbour> {
    let host = Host::live();
    let mut found: Vec<_> = hands::read_all(runtime, Kept::Account)
        .into_iter()
        .filter_map(|seen| serde_json::from_str::<Account>(&seen.text).ok())
        .filter(|account| account.guest != but && account.keep.is_alive(&host))
        .map(|account| Neighbour {
            name: account.guest,
            tenant: account.tenant,
            vcpus: account.vcpus,
            memory_bytes: account.memory_bytes,
            devices: account.devices,
            attrs: account.attrs,
        })
        .collect();
    // The same question in the same order, whatever the folder's.
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Whether this user may not see which guests run.
pub(crate) fn is_hidden(runtime: &Path) -> bool {
    fs::read_dir(runtime).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// What a tenant's guests among these have together.
pub(crate) fn usage(beside: &[Neighbour], tenant: &str) -> Amounts {
    let none = Amounts { guests: 0, vcpus: 0, memory_bytes: 0, devices: 0, attrs: Attrs::new() };
    beside.iter().filter(|guest| guest.tenant == tenant).fold(none, |sum, guest| Amounts {
        guests: sum.guests.saturating_add(1),
        vcpus: sum.vcpus.saturating_add(guest.vcpus),
        memory_bytes: sum.memory_bytes.saturating_add(guest.memory_bytes),
        devices: sum.devices.saturating_add(u32::try_from(guest.devices.len()).unwrap_or(u32::MAX)),
        ..sum
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use casemate_spec::parse_guest;
    use std::fs::File;

    fn guest(name: &str) -> Guest {
        let text = format!(
            "name = \"{name}\"\ntenant = \"acme\"\nvcpus = 2\nmemory = \"1 GiB\"\n[boot]\nkernel = \"k\"\n\
             [[device]]\naddress = \"0000:03:00.0\"\n"
        );
        parse_guest(Path::new("g.toml"), &text).unwrap().guest
    }

    #[test]
    fn accounts_of_living_keeps_are_seen_and_summed() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b", "a"] {
            write(folder.path(), &guest(name)).unwrap();
        }
        File::create(folder.path().join("+uid-0.account")).unwrap();
        let names =
            |but: &str| -> Vec<_> { read(folder.path(), but).into_iter().map(|guest| guest.name).collect() };
        assert_eq!(names(""), ["a", "b"]);
        assert_eq!(names("a"), ["b"]);
        let sum = usage(&read(folder.path(), ""), "acme");
        assert_eq!((sum.guests, sum.vcpus, sum.memory_bytes, sum.devices), (2, 4, 2 << 30, 2));
        assert_eq!(usage(&read(folder.path(), ""), "rival").guests, 0);
        // Of another boot, or of a process that is gone.
        let path = folder.path().join("a.account");
        let text = fs::read_to_string(&path).unwrap();
        let dead = text.replacen("\"start_ticks\":", "\"start_ticks\":9", 1);
        assert_ne!(dead, text);
        fs::write(&path, dead).unwrap();
        assert_eq!(names(""), ["b"]);
    }
}
