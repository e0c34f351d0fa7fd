//! The plugins of a bundle, in the order in which they're asked.

use std::fs::File;

use casemate_policy::{Fault, PolicyError, talk};

use crate::{
    code::Codes,
    plugin::{Plugin, surface},
    sandbox::Ticker,
};

/// What loading came to.
pub(crate) enum Loaded {
    /// It's there, and says this of itself.
    Taken(Box<talk::Described>),
    /// The code is of another engine, or can't be mapped; in words.
    Foreign(String),
}

/// Plugins that can be asked.
pub(crate) struct Judge {
    codes: Codes,
    pub(crate) ticker: Ticker,
    pub(crate) plugins: Vec<Plugin>,
}

impl Judge {
    /// Without any plugin; `enter` is what the thread that counts time does first.
    pub(crate) fn start(enter: impl FnOnce() + Send + 'static) -> Result<Self, PolicyError> {
        let codes = Codes::new()
            .map_err(|error| PolicyError::new(Fault::Engine, "wasmtime", format!("{error:#}")))?;
        let ticker = Ticker::start(codes.engine.clone(), enter).map_err(|error| {
            PolicyError::new(Fault::Engine, "policy-ticker", format!("no thread: {error}"))
        })?;
        Ok(Self { codes, ticker, plugins: Vec::new() })
    }

    /// Loads a plugin, has it check its settings, and asks what it is.
    pub(crate) fn load(&mut self, plugin: talk::Plugin, code: &File) -> Result<Loaded, PolicyError> {
        let component = match self.codes.load(code) {
            Ok(component) => component,
            Err(error) => return Ok(Loaded::Foreign(format!("{error:#}"))),
        };
        let plugin = Plugin::link(&self.codes.engine, plugin, &component)?;
        let description = plugin.describe(&self.ticker)?;
        plugin.check_settings(&self.ticker)?;
        let (imports, exports) = surface(&self.codes.engine, &component);
        // As the plugin has it: whoever asked makes lines of it, since this process isn't believed.
        let described = talk::Described {
            name: description.name,
            version: description.version,
            summary: description.summary,
            kinds: plugin.kinds(),
            reasons: description.reasons,
            changes: description.changes,
            needs: description.needs,
            settings_schema: description.settings_schema,
            imports,
            exports,
        };
        self.plugins.push(plugin);
        Ok(Loaded::Taken(Box::new(described)))
    }

    /// Whether those that fail too often aren't asked any more.
    pub(crate) fn suspend(&mut self, suspends: bool) {
        self.plugins.iter_mut().for_each(|plugin| plugin.suspends = suspends);
    }

    /// Names of the plugins that aren't asked any more.
    pub(crate) fn suspended(&self) -> Vec<String> {
        let all = self.plugins.iter().filter(|plugin| plugin.is_suspended());
        all.map(|plugin| plugin.name.clone()).collect()
    }
}
