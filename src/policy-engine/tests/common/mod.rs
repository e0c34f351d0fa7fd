//! What the tests share: a request, bundles in a folder of their own, and the programs.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, reason = "each test program uses its own part")]

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Once, OnceLock},
};

use casemate_policy::{
    Attrs, Config, Decision, Device, Engine, File, GuestSpec, HostState, Operation, PolicyError, Programs,
    Request, Tenant,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Engine and compiler, run as plain children.
pub fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| Programs::plain(compiler_program(), engine_program()))
}

pub fn engine_program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_casemate-policy-engine"))
}

/// CASEMATE_POLICY_COMPILER, or built here, once, beside what Cargo builds. The first time takes minutes.
pub fn compiler_program() -> &'static Path {
    static COMPILER: OnceLock<PathBuf> = OnceLock::new();
    COMPILER.get_or_init(|| {
        if let Some(path) = std::env::var_os("CASEMATE_POLICY_COMPILER") {
            return path.into();
        }
        // The target folder, from `<target>/<triple>/tmp`: the triple is always given (.cargo/config.toml).
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).ancestors().nth(2).unwrap().join("compiler");
        eprintln!("building casemate-policy-compiler in {} (minutes, the first time)", target.display());
        let built = Command::new(env!("CARGO"))
            .args(["build", "--release", "--quiet", "--locked", "--manifest-path"])
            .arg(root().join("src/policy-compiler/Cargo.toml"))
            .arg("--target-dir")
            .arg(&target)
            .current_dir(root())
            .status();
        assert!(built.unwrap().success(), "the compiler does not build");
        target.join("x86_64-unknown-linux-gnu/release/casemate-policy-compiler")
    })
}

/// A cache that all tests of one program share, so that each plugin is compiled once.
pub fn shared_cache() -> &'static Path {
    static CACHE: OnceLock<TempDir> = OnceLock::new();
    static FILL: Once = Once::new();
    let cache = CACHE.get_or_init(|| tempfile::tempdir().unwrap()).path();
    FILL.call_once(|| {
        for plugin in [limits(), deny_all(), misbehave()] {
            casemate_policy::install(&plugin, &cache.join("c"), programs()).unwrap();
        }
    });
    Box::leak(cache.join("c").into_boxed_path())
}

pub fn limits() -> PathBuf {
    root().join("plugins/built/limits.wasm")
}

pub fn deny_all() -> PathBuf {
    root().join("plugins/built/tests/deny-all.wasm")
}

pub fn misbehave() -> PathBuf {
    root().join("plugins/built/tests/misbehave.wasm")
}

pub fn forbidden() -> PathBuf {
    root().join("plugins/built/tests/forbidden.wasm")
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One plugin in a bundle.
pub fn entry(name: &str, path: &Path, settings: &str) -> String {
    let digest = sha256(&std::fs::read(path).unwrap());
    format!(
        "[[plugin]]\nname = {name:?}\npath = {path:?}\nsha256 = {digest:?}\nsettings = {{ {settings} }}\n"
    )
}

/// A bundle that misbehaves.
pub fn how(how: &str, limits: &str) -> String {
    format!("{}limits = {{ {limits} }}\n", entry("evil", &misbehave(), &format!("how = {how:?}")))
}

/// Opens the text as a bundle, with the shared cache.
pub fn open(bundle: &str) -> Result<Engine, PolicyError> {
    open_with(bundle, shared_cache())
}

pub fn open_with(bundle: &str, cache: &Path) -> Result<Engine, PolicyError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bundle.toml");
    std::fs::write(&path, bundle).unwrap();
    Engine::open(Config { bundle: &path, cache, programs: programs(), key: None })
}

/// Opens the text as a bundle and asks it.
pub fn admit(bundle: &str) -> Result<Decision, PolicyError> {
    open(bundle)?.admit(&request(), None)
}

pub fn request() -> Request {
    let nic = Device {
        address: "0000:03:00.0".parse().unwrap(),
        vendor: 0x8086,
        device: 0x100e,
        subsystem_vendor: 0x1af4,
        subsystem_device: 0x1100,
        class: 0x02_00_00,
        group: Some(3),
        driver: Some("e1000".into()),
        attrs: Attrs::new(),
    };
    let kernel = File {
        path: "/boot/vmlinux".into(),
        size_bytes: 40 << 20,
        sha256: Some("00".repeat(32)),
        attrs: Attrs::new(),
    };
    Request {
        operation: Operation::Create,
        guest: GuestSpec {
            name: "web".into(),
            vcpus: 2,
            memory_bytes: 8 << 30,
            kernel,
            initrd: None,
            command_line: "console=ttyS0".into(),
            devices: vec![nic],
            disks: Vec::new(),
            nets: Vec::new(),
            attrs: Attrs::new(),
        },
        old: None,
        tenant: Tenant { name: "acme".into(), quota: None, usage: None, attrs: Attrs::new() },
        host: HostState {
            name: "host".into(),
            cpus: 8,
            memory_bytes: 32 << 30,
            memory_free_bytes: 16 << 30,
            attrs: Attrs::new(),
        },
        beside: Vec::new(),
        now_seconds: 1_800_000_000,
        attrs: Attrs::new(),
    }
}
