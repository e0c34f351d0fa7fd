//! The policy compiler and engine in cells that this very process makes.

use std::path::Path;

use casemate_policy::{Ended, EngineStreams, Launch, Running, Streams};

use crate::{
    Places, Rules,
    cells::{self, Closed},
};

/// A way to run the programs for policies, for root.
#[derive(Clone, Debug)]
pub struct InCells {
    /// Where cells are made.
    pub places: Places,
    /// What holds for cells here.
    pub rules: Rules,
}

impl Launch for InCells {
    fn compile(&self, program: &Path, streams: Streams) -> Result<Ended, String> {
        cells::compile(&self.places, &self.rules, program, streams)
    }

    fn engine(&self, program: &Path, streams: EngineStreams) -> Result<Box<dyn Running>, String> {
        Ok(Box::new(cells::engine(&self.places, &self.rules, program, streams)?))
    }
}

impl Running for Closed {
    fn pid(&self) -> u32 {
        Self::pid(self)
    }

    fn end(self: Box<Self>) -> String {
        Self::end(*self)
    }
}
