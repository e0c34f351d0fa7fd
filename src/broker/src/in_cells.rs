//! The policy compiler and engine in cells that this very process makes.

use std::{collections::BTreeSet, path::Path};

use casemate_policy::{Ended, EngineStreams, Launch, Running, Streams};
use casemate_spec::CellPart;

use crate::{
    Places,
    cells::{self, Closed},
};

/// A way to run the programs for policies, for root.
#[derive(Clone, Debug)]
pub struct InCells {
    /// Where cells are made.
    pub places: Places,
    /// What of a cell may be lacking here.
    pub may_lack: BTreeSet<CellPart>,
}

impl Launch for InCells {
    fn compile(&self, program: &Path, streams: Streams) -> Result<Ended, String> {
        cells::compile(&self.places, self.may_lack.clone(), program, streams)
    }

    fn engine(&self, program: &Path, streams: EngineStreams) -> Result<Box<dyn Running>, String> {
        Ok(Box::new(cells::engine(&self.places, self.may_lack.clone(), program, streams)?))
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
