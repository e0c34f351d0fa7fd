//! What a plugin's word counts for: by tenant and operation, from "not asked" to "nobody can override it".

use serde::{Deserialize, Serialize};

use crate::request::{Operation, Request};

/// How far a rule is rolled out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The plugin isn't asked.
    Off,
    /// It's asked, and what it says is recorded; nobody sees it otherwise, and it holds nothing up.
    Monitor,
    /// What it refuses is shown as a warning.
    Warn,
    /// What it refuses is refused, as far as its level goes.
    #[default]
    Enforce,
}

/// How binding an enforced rule is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// What it refuses is shown as a warning.
    Advisory,
    /// An operator may override it with a reason, which is recorded.
    Soft,
    /// Nobody can override it.
    #[default]
    Hard,
}

/// Mode and level together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// How far it is rolled out.
    pub mode: Mode,
    /// How binding it is.
    pub level: Level,
}

/// What a denial under a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// It's written down.
    Record,
    /// It's shown.
    Warn,
    /// It refuses, unless an operator overrides it.
    DenySoftly,
    /// It refuses.
    Deny,
}

impl Rule {
    /// What a denial does; none when the plugin isn't even asked.
    pub fn effect(self) -> Option<Effect> {
        match (self.mode, self.level) {
            (Mode::Off, _) => None,
            (Mode::Monitor, _) => Some(Effect::Record),
            (Mode::Warn, _) | (Mode::Enforce, Level::Advisory) => Some(Effect::Warn),
            (Mode::Enforce, Level::Soft) => Some(Effect::DenySoftly),
            (Mode::Enforce, Level::Hard) => Some(Effect::Deny),
        }
    }
}

/// A rule for some tenants and operations: the bundle's `[[plugin.for]]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    /// All when left out.
    tenants: Option<Vec<String>>,
    /// All when left out.
    operations: Option<Vec<Operation>>,
    /// The plugin's own when left out.
    mode: Option<Mode>,
    /// The plugin's own when left out.
    level: Option<Level>,
}

impl Selector {
    /// `operation` is none where nothing is asked for: a guest runs, a device comes back.
    fn fits(&self, tenant: &str, operation: Option<Operation>) -> bool {
        self.tenants.as_ref().is_none_or(|tenants| tenants.iter().any(|known| known == tenant))
            && self
                .operations
                .as_ref()
                .is_none_or(|operations| operation.is_some_and(|operation| operations.contains(&operation)))
    }

    /// Why it could never do anything, if so.
    pub(crate) fn flaw(&self) -> Option<&'static str> {
        if self.tenants.as_ref().is_some_and(Vec::is_empty) {
            Some("it's for no tenant: leave `tenants` out for all, or name some")
        } else if self.operations.as_ref().is_some_and(Vec::is_empty) {
            Some("it's for no operation: leave `operations` out for all, or name some")
        } else if self.mode.is_none() && self.level.is_none() {
            Some("it sets neither `mode` nor `level`")
        } else {
            None
        }
    }
}

/// A plugin's rule, and those for some tenants and operations. The first that fits holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Where no selector fits.
    pub default: Rule,
    /// In the order of the bundle.
    pub selectors: Vec<Selector>,
}

impl Rules {
    /// The rule for who asks for something.
    pub fn rule(&self, request: &Request) -> Rule {
        self.first(&request.tenant.name, Some(request.operation))
    }

    /// The rule for a guest that runs, or a device that comes back.
    pub fn rule_of(&self, tenant: &str) -> Rule {
        self.first(tenant, None)
    }

    fn first(&self, tenant: &str, operation: Option<Operation>) -> Rule {
        let own = self.default;
        let first = self.selectors.iter().find(|selector| selector.fits(tenant, operation));
        first.map_or(own, |selector| Rule {
            mode: selector.mode.unwrap_or(own.mode),
            level: selector.level.unwrap_or(own.level),
        })
    }

    /// Whether the plugin is asked for anybody at all.
    pub fn is_ever_asked(&self) -> bool {
        self.default.mode != Mode::Off
            || self.selectors.iter().any(|selector| selector.mode.is_some_and(|mode| mode != Mode::Off))
    }
}
