//! temporary
use casemate_host::*;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let host_address = a.get(2).filter(|x| *x != "-").map(|x| {
        let (i, p) = x.split_once('/').unwrap();
        (i.parse().unwrap(), p.parse().unwrap())
    });
    let r = Tap::create(&TapRequest { name: a[1].clone(), host_address, bridge: a.get(3).cloned() });
    println!("{r:?}");
    match r {
        Ok(t) => {
            let _ = std::process::Command::new("ip").args(["-d", "addr", "show", &t.name]).status();
            println!(
                "{:?}",
                Tap::create(&TapRequest { name: a[1].clone(), host_address: None, bridge: None })
                    .map_err(|r| r.to_string())
            );
        }
        Err(r) => println!("{r}"),
    }
}
