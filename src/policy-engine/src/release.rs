//! From the rulings of all plugins to one about a device that comes back.

use casemate_policy::{Effect, Kind, Reason, ReleasedDevice, Ruling};

use crate::judge::Judge;

impl Judge {
    /// Asks all plugins that judge devices. A plugin that fails and whose word counts condemns the device: nobody knows what it
    /// would have said.
    pub(crate) fn release(&self, device: &ReleasedDevice) -> Ruling {
        let mut ruling = Ruling::default();
        for plugin in self.plugins.iter().filter(|plugin| plugin.is(Kind::Device)) {
            let Some(effect) = plugin.rules.rule_of(&device.tenant).effect() else { continue };
            let answer = plugin.counted(|| plugin.release(&self.ticker, device));
            let binds = effect >= Effect::DenySoftly;
            match answer {
                Ok((false, reasons)) if binds => ruling.quarantine.extend(reasons),
                Ok((_, reasons)) => ruling.warnings.extend(reasons),
                Err(error) => {
                    let reason = Reason::of_casemate("plugin-failed", error.to_string());
                    if binds { &mut ruling.quarantine } else { &mut ruling.warnings }.push(reason);
                }
            }
        }
        ruling
    }
}
