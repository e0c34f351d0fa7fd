//! `casemate devices`.

use std::process::ExitCode;

use casemate_host::{Host, Ledger, PciFunction, assignable};
use casemate_keep::Paths;
use clap::Args;
use serde::Serialize;

use crate::output::{self, Failure};

#[derive(Args)]
pub(crate) struct Options {
    /// Show bridges too.
    #[arg(long)]
    bridges: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    function: &'a PciFunction,
    assignable: bool,
    why_not: Option<String>,
    code: Option<&'static str>,
}

pub(crate) fn devices(paths: &Paths, options: &Options, json: bool) -> Result<ExitCode, Failure> {
    let host = Host::live();
    let functions = host.functions()?;
    // Without root the ledger cannot be read; what is claimed then shows by its driver alone.
    let ledger = Ledger::open(&paths.state).ok();
    let lines: Vec<Line<'_>> = functions
        .iter()
        .filter(|function| options.bridges || json || !function.is_bridge)
        .map(|function| {
            let refusal =
                assignable(&host, &functions, ledger.as_ref(), &whole_group(&functions, function)).err();
            Line {
                function,
                assignable: refusal.is_none(),
                code: refusal.as_ref().map(|refusal| refusal.code),
                why_not: refusal.map(|refusal| format!("{}; {}", refusal.cause, refusal.remedy)),
            }
        })
        .collect();
    if json {
        lines.iter().for_each(output::json);
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![
        ["ADDRESS", "ID", "DEVICE", "DRIVER", "GROUP +MATES", "RESET", "FOR A GUEST"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(lines.iter().map(row));
    output::line(output::table(&rows).trim_end());
    for line in &lines {
        if let Some(why) = &line.why_not {
            output::line(&format!("{}: {why}", line.function.address));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The function with those of its group that a guest would have to get with it.
fn whole_group(functions: &[PciFunction], function: &PciFunction) -> Vec<casemate_spec::PciAddress> {
    let mate = |address: &&casemate_spec::PciAddress| {
        functions.iter().any(|other| other.address == **address && !other.is_bridge)
    };
    std::iter::once(function.address).chain(function.group_mates.iter().filter(mate).copied()).collect()
}

/// An address without its domain, where that is 0.
fn short(address: casemate_spec::PciAddress) -> String {
    let text = address.to_string();
    text.strip_prefix("0000:").map_or_else(|| text.clone(), str::to_owned)
}

fn row(line: &Line<'_>) -> Vec<String> {
    let function = line.function;
    let group = match function.iommu_group {
        None => "none".to_owned(),
        Some(group) => {
            let mates = function.group_mates.iter().map(|mate| short(*mate));
            std::iter::once(group.to_string()).chain(mates).collect::<Vec<_>>().join(" +")
        }
    };
    let resets =
        if function.reset_methods.is_empty() { "none".into() } else { function.reset_methods.join(" ") };
    let name: String =
        format!("{} {}", function.vendor_name, function.device_name).chars().take(44).collect();
    vec![
        function.address.to_string(),
        format!("{:04x}:{:04x}", function.vendor, function.device),
        name,
        function.driver.clone().unwrap_or_else(|| "-".into()),
        group,
        resets,
        line.code.map_or_else(|| "yes".to_owned(), |code| format!("no: {code}")),
    ]
}
