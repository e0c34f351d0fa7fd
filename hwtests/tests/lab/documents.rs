//! What the documents tell people to type, typed.

use std::{fs, path::Path, time::Duration};

use casemate_hwtests::{
    devices, expect,
    harness::{Ctx, Failure, GuestImage},
};
use rustix::process::Signal;

/// A command of the documents, and what they say it answers.
struct Told {
    place: String,
    words: Vec<String>,
    refused: bool,
}

/// Every `$ casemate` line in a fenced block of the file, with or without sudo.
fn told_in(file: &str) -> Result<Vec<Told>, Failure> {
    let text = fs::read_to_string(file).map_err(|error| Failure::new(format_args!("{file}: {error}")))?;
    let mut told: Vec<Told> = Vec::new();
    let (mut fenced, mut answer) = (false, false);
    for (number, line) in (1..).zip(text.lines()) {
        if line.starts_with("```") {
            (fenced, answer) = (!fenced, false);
        } else if let Some(command) = line.strip_prefix("$ ").filter(|_| fenced) {
            let command = command.strip_prefix("sudo ").unwrap_or(command);
            answer = command.starts_with("casemate ");
            if answer {
                let words = command.split_whitespace().map(str::to_owned).collect();
                told.push(Told { place: format!("{file}:{number}"), words, refused: false });
            }
        } else if answer
            && line.starts_with("refused: ")
            && let Some(last) = told.last_mut()
        {
            last.refused = true;
        }
    }
    Ok(told)
}

/// The commands run in the lab, from the root of the tree, and end as the documents say: done, or refused.
pub(crate) fn commands_run(ctx: &mut Ctx) -> Result<(), Failure> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"));
    std::env::set_current_dir(root)?;
    for driver in ["nvme", "e1000e"] {
        ctx.load_driver(driver)?;
    }
    // The documents' own guest, and what the demo makes for the examples.
    GuestImage::new("true").write(ctx.layout(), Path::new("target/lab/demo.cpio"))?;
    for image in ["target/lab/demo.img", "data.img"] {
        fs::write(image, vec![0; 1 << 16])?;
    }
    let example = fs::read_to_string("examples/nvme-and-nic.toml")?;
    fs::write("guest.toml", example.replace("../", ""))?;
    expect!(example.contains(devices::NVME), "the example has the lab's drive");

    // The documents look at a guest that runs.
    let disk = ctx.directory().join("web.img");
    fs::write(&disk, vec![0; 1 << 16])?;
    let web = ctx.start_guest(&ctx.guest("sleep 600")?.named("web").slots(2).disk(&disk, false))?;
    web.wait_for_text("CASEMATE-INIT", Duration::from_secs(120))?;

    let mut files = vec!["README.md".to_owned()];
    for entry in fs::read_dir("docs")?.flatten() {
        let path = entry.path();
        files.extend(path.extension().is_some_and(|end| end == "md").then(|| path.display().to_string()));
    }
    let mut count = 0;
    for told in files.iter().map(|file| told_in(file)).collect::<Result<Vec<_>, _>>()?.into_iter().flatten() {
        // From the root of the tree, as the documents mean it.
        let arguments = told.words.get(1..).unwrap_or_default().join(" ");
        let program = ctx.program("casemate")?;
        let script = format!("cd {} && exec {} {arguments}", root.display(), program.display());
        let run = ctx.run(["sh", "-c", &script])?;
        let expected = if told.refused { Some(1) } else { Some(0) };
        expect!(
            run.status.code() == expected,
            "{}: {} ended with {:?}",
            told.place,
            told.words.join(" "),
            run.status
        );
        count += 1;
    }
    expect!(count >= 5, "{count} commands were found in the documents");
    // Asked, and then told.
    web.signal(Signal::TERM)?;
    web.signal(Signal::TERM)?;
    web.wait(Duration::from_secs(60))?;
    Ok(())
}
