//! How the others are started: words of their command lines, and the files that they want.

use std::{ffi::OsString, fs, path::Path};

use casemate_hwtests::harness::{Ctx, Failure};
use serde_json::{Value, json};

use super::{Guest, Net};

pub(super) fn qemu(guest: &Guest, closed: bool) -> Vec<OsString> {
    let fixed = "qemu-system-x86_64 -enable-kvm -M q35 -cpu host -smp 1 -display none -nodefaults -serial stdio -no-reboot";
    let mut words = before(closed);
    words.extend(fixed.split(' ').map(OsString::from));
    let mut add = |option: &str, value: OsString| words.extend([OsString::from(option), value]);
    add("-m", guest.memory_mib.to_string().into());
    add("-kernel", guest.kernel.clone().into());
    if let Some(initrd) = &guest.initrd {
        add("-initrd", initrd.into());
    }
    add("-append", "console=ttyS0 quiet".into());
    if guest.has_entropy() {
        add("-device", "virtio-rng-pci".into());
    }
    if guest.has_balloon() {
        add("-device", "virtio-balloon-pci,free-page-reporting=on".into());
    }
    if closed {
        let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
        add("-sandbox", sandbox.into());
    }
    for (number, (path, read_only)) in guest.disks.iter().enumerate() {
        let read_only = if *read_only { "on" } else { "off" };
        let image = path.display();
        add("-drive", format!("file={image},if=none,id=d{number},format=raw,aio=io_uring,cache=writeback,readonly={read_only}").into());
        add("-device", format!("virtio-blk-pci,drive=d{number}").into());
    }
    if let Some(Net { tap, vhost, .. }) = guest.net {
        let vhost = if vhost { "on" } else { "off" };
        add("-netdev", format!("tap,id=n0,ifname={tap},script=no,downscript=no,vhost={vhost}").into());
        add("-device", "virtio-net-pci,netdev=n0,romfile=".into());
    }
    if let Some(address) = guest.device {
        add("-device", format!("vfio-pci,host={address}").into());
    }
    words
}

/// What gives a VMM a user of its own that can't do so itself, or not where it denies itself calls for rights.
fn before(closed: bool) -> Vec<OsString> {
    let words = if closed { "setpriv --reuid=65534 --regid=65534 --clear-groups" } else { "" };
    words.split_whitespace().map(OsString::from).collect()
}

/// Under its own filters, which it has always.
pub(super) fn cloud_hypervisor(program: &Path, guest: &Guest, closed: bool) -> Vec<OsString> {
    let fixed = "--cmdline|console=ttyS0 quiet|--cpus|boot=1|--serial|tty|--console|off|--seccomp|true";
    let mut words = before(closed);
    words.push(program.into());
    words.extend(fixed.split('|').map(OsString::from));
    let mut add = |option: &str, values: &[String]| {
        words.push(option.into());
        words.extend(values.iter().map(OsString::from));
    };
    add("--kernel", &[guest.kernel.display().to_string()]);
    if let Some(initrd) = &guest.initrd {
        add("--initramfs", &[initrd.display().to_string()]);
    }
    add("--memory", &[format!("size={}M", guest.memory_mib)]);
    // It has a source of entropy by itself.
    if guest.has_balloon() {
        add("--balloon", &["size=0,free_page_reporting=on".to_owned()]);
    }
    let disks: Vec<String> = guest
        .disks
        .iter()
        .map(|(path, read_only)| {
            let read_only = if *read_only { "on" } else { "off" };
            format!("path={},readonly={read_only},image_type=raw", path.display())
        })
        .collect();
    if !disks.is_empty() {
        add("--disk", &disks);
    }
    if let Some(Net { tap, host_address, .. }) = guest.net {
        let address = host_address.split('/').next().unwrap_or_default();
        add("--net", &[format!("tap={tap},ip={address},mask=255.255.255.0")]);
    }
    if let Some(address) = guest.device {
        add("--device", &[format!("path=/sys/bus/pci/devices/{address}/")]);
    }
    if closed {
        add("--landlock", &[]);
    }
    words
}

/// Without a jail; its filters hold.
pub(super) fn firecracker(ctx: &Ctx, program: &Path, guest: &Guest) -> Result<Vec<OsString>, Failure> {
    let config = ctx.directory().join("firecracker.json");
    fs::write(&config, firecracker_machine(guest, |path| path.display().to_string()).to_string())?;
    // Its log goes to where the guest's console goes, into the middle of a line.
    let fixed = "--no-api --enable-pci --level Error --config-file";
    let mut words = vec![OsString::from(program)];
    words.extend(fixed.split(' ').map(OsString::from));
    words.push(config.into());
    Ok(words)
}

/// Under its jailer, which wants each file in the root that it makes.
pub(super) fn jailed_firecracker(
    ctx: &Ctx,
    jailer: &Path,
    program: &Path,
    guest: &Guest,
) -> Result<Vec<OsString>, Failure> {
    let base = ctx.directory().join("jailer");
    let root = base.join("firecracker/bench/root");
    fs::create_dir_all(&root)?;
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let disks = guest.disks.iter().map(|(path, _)| path);
    for path in [&guest.kernel].into_iter().chain(&guest.initrd).chain(disks) {
        fs::copy(path, root.join(name(path)))?;
    }
    let machine = firecracker_machine(guest, |path| format!("/{}", name(path)));
    fs::write(root.join("machine.json"), machine.to_string())?;
    ctx.run(["chown", "-R", "65534:65534", &root.to_string_lossy()])?.success()?;
    let fixed = "--id bench --uid 65534 --gid 65534 --cgroup-version 2 --chroot-base-dir";
    let inner = "-- --no-api --enable-pci --level Error --config-file /machine.json";
    let mut words = vec![OsString::from(jailer), "--exec-file".into(), program.into()];
    words.extend(fixed.split(' ').map(OsString::from));
    words.push(base.into());
    words.extend(inner.split(' ').map(OsString::from));
    Ok(words)
}

/// The file of a machine, with its paths as they are called where it runs.
fn firecracker_machine(guest: &Guest, called: impl Fn(&Path) -> String) -> Value {
    let drives: Vec<Value> = (0..)
        .zip(&guest.disks)
        .map(|(number, (path, read_only))| {
            json!({
                "drive_id": format!("d{number}"), "path_on_host": called(path), "is_root_device": false,
                "is_read_only": read_only, "io_engine": "Async", "cache_type": "Writeback",
            })
        })
        .collect();
    let nets: Vec<Value> =
        guest.net.iter().map(|net| json!({ "iface_id": "n0", "host_dev_name": net.tap })).collect();
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true });
    json!({
        "boot-source": {
            "kernel_image_path": called(&guest.kernel), "initrd_path": guest.initrd.as_deref().map(&called),
            "boot_args": "console=ttyS0 quiet",
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": guest.memory_mib },
        "drives": drives, "network-interfaces": nets,
        "entropy": guest.has_entropy().then(|| json!({})), "balloon": guest.has_balloon().then_some(balloon),
    })
}
