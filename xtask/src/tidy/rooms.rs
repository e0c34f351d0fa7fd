//! Which crate may use which: the walls of the house. `ARCHITECTURE.md` tells why.

/// A crate and the crates of this house that it may use.
pub(crate) struct Room {
    /// The crate.
    pub(crate) name: &'static str,
    /// Crates that stand above it in [`ROOMS`].
    pub(crate) uses: &'static [&'static str],
}

const fn room(name: &'static str, uses: &'static [&'static str]) -> Room {
    Room { name, uses }
}

/// Every crate but the plugins, each below those that it uses.
pub(crate) const ROOMS: &[Room] = &[
    room("casemate-spec", &[]),
    room("casemate-wire", &[]),
    room("casemate-pci", &[]),
    room("casemate-virtio", &["casemate-pci"]),
    room("casemate-chipset", &[]),
    room("casemate-passthrough", &["casemate-pci"]),
    room("casemate-filters", &[]),
    room(
        "casemate-vmm",
        &[
            "casemate-chipset",
            "casemate-filters",
            "casemate-passthrough",
            "casemate-pci",
            "casemate-virtio",
            "casemate-wire",
        ],
    ),
    room("casemate-jail", &["casemate-filters", "casemate-spec"]),
    room("casemate-victims", &["casemate-filters", "casemate-jail", "casemate-spec"]),
    room("casemate-host", &["casemate-spec"]),
    room("casemate-policy", &["casemate-spec"]),
    room("casemate-policy-engine", &["casemate-filters", "casemate-policy", "casemate-spec"]),
    room("casemate-policy-compiler", &["casemate-filters", "casemate-policy", "casemate-policy-engine"]),
    room(
        "casemate-broker",
        &["casemate-host", "casemate-jail", "casemate-policy", "casemate-spec", "casemate-wire"],
    ),
    room(
        "casemate-keep",
        &[
            "casemate-broker",
            "casemate-filters",
            "casemate-host",
            "casemate-jail",
            "casemate-policy",
            "casemate-spec",
            "casemate-wire",
        ],
    ),
    room(
        "casemate",
        &["casemate-filters", "casemate-host", "casemate-keep", "casemate-policy", "casemate-spec"],
    ),
    room(
        "casemate-fuzz",
        &[
            "casemate-chipset",
            "casemate-passthrough",
            "casemate-pci",
            "casemate-spec",
            "casemate-virtio",
            "casemate-wire",
        ],
    ),
    room(
        "casemate-hwtests",
        &["casemate-broker", "casemate-filters", "casemate-host", "casemate-jail", "casemate-spec"],
    ),
    room("xtask", &["casemate-hwtests"]),
];

/// The one crate of this house that a plugin may use.
pub(crate) const PLUGIN_SDK: &str = "casemate-plugin-sdk";

/// What must not be in a program, whoever brings it.
pub(crate) struct Ban {
    /// The program's crate.
    pub(crate) program: &'static str,
    /// Names of crates; one that ends in `*` stands for all that begin so.
    pub(crate) names: &'static [&'static str],
    /// Why.
    pub(crate) why: &'static str,
}

/// Where the two programs must not mix.
pub(crate) const BANS: &[Ban] = &[
    Ban {
        program: "casemate-vmm",
        names: &[
            "axum",
            "casemate-spec",
            "clap*",
            "hyper*",
            "rusqlite",
            "serde_json",
            "tokio*",
            "toml*",
            "wasm*",
        ],
        why: "a cell holds no Wasm engine, no database, no HTTP and no parser of files",
    },
    Ban {
        program: "casemate",
        names: &[
            "casemate-chipset",
            "casemate-passthrough",
            "casemate-pci",
            "casemate-virtio",
            "casemate-vmm",
            "kvm-ioctls",
            "linux-loader",
            "vm-memory",
        ],
        why: "who decides runs no guest: no device model, no KVM",
    },
    Ban {
        program: "casemate",
        names: &["casemate-policy-engine", "cranelift*", "pulley*", "wasmtime*"],
        why: "who decides about devices and processes runs no plugin: the engine is a program of its own",
    },
    Ban {
        program: "casemate-broker",
        names: &[
            "casemate-chipset",
            "casemate-keep",
            "casemate-passthrough",
            "casemate-pci",
            "casemate-policy-engine",
            "casemate-virtio",
            "casemate-vmm",
            "clap*",
            "cranelift*",
            "kvm-ioctls",
            "linux-loader",
            "vm-memory",
            "wasmtime*",
        ],
        why: "who is root decides nothing, runs no guest and no plugin",
    },
    Ban {
        program: "casemate-policy-engine",
        names: &[
            "casemate-host",
            "casemate-jail",
            "clap*",
            "cranelift-assembler*",
            "cranelift-codegen*",
            "cranelift-frontend",
            "cranelift-native",
            "regalloc2",
            "wasmtime-internal-cranelift",
            "wasmtime-internal-winch",
            "winch*",
        ],
        why: "who runs plugins opens nothing, and the compiler is a program of its own (cranelift-bforest, -bitset and -entity are collections, no compiler)",
    },
];

/// Programs whose external crates are listed one by one.
pub(crate) const LISTED_PROGRAM: &str = "casemate-vmm";
