//! A guest that was admitted, and what is asked when something of it is to change while it runs.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use casemate_broker::hands;
use casemate_policy::{GuestSpec, Operation, Outcome, Record, Request, Verdict};
use casemate_spec::{HostFile, Refusal};

use crate::{
    Decisions, Paths, PolicyReport, Refusals,
    admission::{self, Inventory},
    beside, facts,
    policies::Policies,
    record::now_seconds,
};

/// What policies know of a guest that runs. It can be shared among threads.
pub(crate) struct Admitted {
    paths: Paths,
    bundle: PathBuf,
    policies: Arc<Policies>,
    /// What it says was told to the broker as well, and is not read again.
    host_file: HostFile,
    /// The question that was answered with yes last, with the guest as it is.
    question: Mutex<Request>,
}

impl Admitted {
    pub(crate) fn new(
        paths: &Paths,
        bundle: &Path,
        policies: Arc<Policies>,
        host_file: &HostFile,
        question: Request,
    ) -> Self {
        Self {
            paths: paths.clone(),
            bundle: std::path::absolute(bundle).unwrap_or(bundle.to_owned()),
            policies,
            host_file: host_file.clone(),
            question: Mutex::new(question),
        }
    }

    /// What decides.
    pub(crate) fn policies(&self) -> Arc<Policies> {
        Arc::clone(&self.policies)
    }

    pub(crate) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// What the operator says of this host, as it was when the guest started.
    pub(crate) fn host_file(&self) -> &HostFile {
        &self.host_file
    }

    /// The guest as it is.
    pub(crate) fn spec(&self) -> GuestSpec {
        self.question.lock().unwrap_or_else(PoisonError::into_inner).guest.clone()
    }

    /// Something of the guest has gone, which needs nobody's leave.
    pub(crate) fn becomes(&self, change: impl FnOnce(&mut GuestSpec)) {
        change(&mut self.question.lock().unwrap_or_else(PoisonError::into_inner).guest);
    }

    /// May this be done, and the guest be as `spec` says? `change` tells what is to change, in words: `add disk 1`. The decision is
    /// kept; after a yes, the guest is so.
    ///
    /// # Errors
    /// The policies' refusals, and `policy-change` when one wants the guest to be otherwise still: a running guest isn't changed
    /// by a policy.
    pub(crate) fn ask(
        &self,
        operation: Operation,
        spec: GuestSpec,
        change: &str,
    ) -> Result<PolicyReport, Refusals> {
        self.decide(self.request(operation, spec, change))
    }

    /// The same of devices that are to come, with what the host has of them.
    ///
    /// # Errors
    /// As [`Admitted::ask`].
    pub(crate) fn ask_for_devices(
        &self,
        spec: GuestSpec,
        change: &str,
        inventory: Inventory<'_>,
    ) -> Result<PolicyReport, Refusals> {
        let mut request = self.request(Operation::HotPlug, spec, change);
        inventory.tell_devices(&mut request.beside)?;
        inventory.tell(&mut request.host.attrs)?;
        self.decide(request)
    }

    fn decide(&self, request: Request) -> Result<PolicyReport, Refusals> {
        let now = request.now_seconds;
        let engine = self.policies.current();
        let answer = engine.admit(&request, None);
        let record = Record {
            id: admission::new_id(now)?,
            time_seconds: now,
            uid: hands::operator_uid(),
            bundle: self.bundle.to_string_lossy().into_owned(),
            bundle_sha256: Some(engine.bundle_digest().to_owned()),
            override_why: None,
            request,
            outcome: Outcome::from(&answer),
        };
        Decisions::below(&self.paths.state).append(&record)?;
        let decision = answer.map_err(Refusal::from)?;
        if let Some(change) = decision.changes.first() {
            let remedy = "leave this operation out of what the plugin changes, or start the guest so";
            return Err(Refusal::new(
                "policy-change",
                change,
                "a running guest isn't changed by a policy",
                remedy,
            )
            .into());
        }
        let Verdict::Allow { warnings } = &decision.verdict else {
            return Err(Refusals(decision.refusals()));
        };
        let report = PolicyReport {
            decision: record.id,
            plugins: decision.plugins.iter().map(|run| (run.name.clone(), run.digest.clone())).collect(),
            changes: Vec::new(),
            overridden: Vec::new(),
            warnings: warnings.iter().map(ToString::to_string).collect(),
            caveats: Vec::new(),
            load: std::time::Duration::ZERO,
            ask: decision.elapsed,
        };
        *self.question.lock().unwrap_or_else(PoisonError::into_inner) = record.request;
        Ok(report)
    }

    fn request(&self, operation: Operation, spec: GuestSpec, change: &str) -> Request {
        let before = self.question.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let beside = beside::read(&self.paths.runtime, &before.guest.name);
        let mut tenant = before.tenant;
        tenant.usage = Some(beside::usage(&beside, &tenant.name));
        let mut attrs = before.attrs;
        attrs.insert("change".into(), change.to_owned());
        let mut host = admission::host_state(facts::host());
        // Its cell is as it was closed.
        host.attrs.extend(before.host.attrs.into_iter().filter(|(name, _)| name == "weakened"));
        let changes = matches!(operation, Operation::Update | Operation::HotPlug);
        Request {
            operation,
            old: changes.then_some(before.guest),
            guest: spec,
            tenant,
            host,
            beside,
            now_seconds: now_seconds(),
            attrs,
        }
    }
}
