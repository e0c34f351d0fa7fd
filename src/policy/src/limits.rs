//! Every limit, by name.

/// What a bundle may set for each plugin, and what holds when it doesn't.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PluginLimits {
    /// Most linear memory of one call, all of the plugin's memories together.
    pub memory_bytes: usize,
    /// Most fuel of one call; about one unit an instruction.
    pub fuel: u64,
    /// Most time of one call by the clock. Fuel is meant to end a plugin first, on every host at the same place; this
    /// is for a host that stalls, or calls that cost time and no fuel.
    pub deadline_ms: u64,
    /// Most elements of each table.
    pub table_elements: usize,
    /// Most core instances, memories and tables in one component, each.
    pub instances: usize,
}

impl PluginLimits {
    /// For plugins in a compiled language.
    pub const DEFAULT: Self = Self {
        memory_bytes: 32 << 20,
        fuel: 20_000_000,
        deadline_ms: 2_000,
        table_elements: 4_096,
        instances: 8,
    };
    /// For plugins that bring an interpreter: QuickJS takes half a million instructions to come to itself.
    pub const SCRIPTED: Self = Self {
        memory_bytes: 64 << 20,
        fuel: 100_000_000,
        deadline_ms: 5_000,
        table_elements: 16_384,
        instances: 16,
    };
    /// The most that a bundle may set: enough for an interpreter in a plugin.
    pub const MOST: Self = Self {
        memory_bytes: 64 << 20,
        fuel: 2_000_000_000,
        deadline_ms: 10_000,
        table_elements: 16_384,
        instances: 16,
    };
}

/// What a plugin is written in, which says where its limits begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lane {
    /// A compiled language: [`PluginLimits::DEFAULT`].
    #[default]
    Native,
    /// A language with an interpreter: [`PluginLimits::SCRIPTED`].
    Scripted,
}

impl Lane {
    /// The limits that hold where a bundle sets no others.
    pub const fn limits(self) -> PluginLimits {
        match self {
            Self::Native => PluginLimits::DEFAULT,
            Self::Scripted => PluginLimits::SCRIPTED,
        }
    }
}

/// What no bundle can change.
#[derive(Clone, Copy, Debug)]
pub struct HostLimits {
    /// A bundle's TOML file.
    pub bundle_bytes: usize,
    /// Plugins in a bundle.
    pub plugins: usize,
    /// A plugin's component.
    pub component_bytes: usize,
    /// What the compiler made of it.
    pub compiled_bytes: usize,
    /// Time for compiling one plugin.
    pub compile_ms: u64,
    /// A request, as JSON.
    pub request_bytes: usize,
    /// All text of an answer.
    pub answer_bytes: usize,
    /// Reasons and warnings of an answer.
    pub reasons: usize,
    /// Actions of a governor's answer.
    pub actions: usize,
    /// What a governor remembers from one call to the next.
    pub state_bytes: usize,
    /// What one crossing may make the host allocate when a governor answers: for all guests of a host at once.
    pub tick_crossing_bytes: usize,
    /// After so many failures in a row a plugin isn't asked again until its bundle is read anew.
    pub failures: u32,
    /// Log of a call that is kept.
    pub log_bytes: usize,
    /// Log of a call after which the plugin is stopped.
    pub log_flood_bytes: usize,
    /// What one crossing from plugin to host may make the host allocate.
    pub crossing_bytes: usize,
    /// Stack of a plugin's code.
    pub stack_bytes: usize,
}

/// The limits in force.
pub const HOST_LIMITS: HostLimits = HostLimits {
    bundle_bytes: 256 << 10,
    plugins: 32,
    component_bytes: 32 << 20,
    compiled_bytes: 256 << 20,
    compile_ms: 60_000,
    request_bytes: 256 << 10,
    answer_bytes: 64 << 10,
    reasons: 64,
    actions: 4_096,
    state_bytes: 64 << 10,
    tick_crossing_bytes: 2 << 20,
    failures: 5,
    log_bytes: 16 << 10,
    log_flood_bytes: 1 << 20,
    crossing_bytes: 128 << 10,
    stack_bytes: 512 << 10,
};

// An answer in bounds has to get across.
const _: () = assert!(HOST_LIMITS.crossing_bytes >= HOST_LIMITS.answer_bytes + HOST_LIMITS.reasons * 512);
const _: () = assert!(PluginLimits::DEFAULT.memory_bytes <= PluginLimits::MOST.memory_bytes);
const _: () = assert!(PluginLimits::SCRIPTED.memory_bytes <= PluginLimits::MOST.memory_bytes);
