//! What is told besides, by name: docs/policies.md lists the names.

use crate::{Attrs, GuestSpec, HostState};

/// The value of a name; none when this host doesn't tell it.
pub fn attr<'a>(attrs: &'a Attrs, name: &str) -> Option<&'a str> {
    attrs.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// A logical processor of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// Its number.
    pub number: u32,
    /// Its NUMA node.
    pub node: u32,
    /// Its package (socket).
    pub package: u32,
    /// Its core, unique within the package: two processors of one core are siblings.
    pub core: u32,
}

impl HostState {
    /// The processors and where they sit (`cpu-topology`); empty when the host doesn't tell.
    pub fn processors(&self) -> Vec<Processor> {
        let number = |text: &str| text.parse::<u32>().ok();
        attr(&self.attrs, "cpu-topology")
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|word| {
                let (cpu, place) = word.split_once('@')?;
                let mut place = place.split('.');
                Some(Processor {
                    number: number(cpu)?,
                    node: number(place.next()?)?,
                    package: number(place.next()?)?,
                    core: number(place.next()?)?,
                })
            })
            .collect()
    }
}

impl GuestSpec {
    /// Processors of the host to which its vCPUs are pinned (`cpu-pins`), each once, sorted; empty when they float.
    pub fn pins(&self) -> Vec<u32> {
        pins(&self.attrs)
    }
}

impl crate::Neighbour {
    /// As [`GuestSpec::pins`].
    pub fn pins(&self) -> Vec<u32> {
        pins(&self.attrs)
    }
}

fn pins(attrs: &Attrs) -> Vec<u32> {
    let list = attr(attrs, "cpu-pins").unwrap_or_default();
    list.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use crate::testing::request;

    #[test]
    fn topology_and_pins_are_read() {
        let mut request = request();
        assert!(request.host.processors().is_empty());
        assert!(request.guest.pins().is_empty());
        request.host.attrs = vec![("cpu-topology".into(), "0@0.0.0 1@0.0.1 x 2@1.1.0".into())];
        let seen: Vec<_> = request.host.processors().iter().map(|p| (p.number, p.node, p.core)).collect();
        assert_eq!(seen, [(0, 0, 0), (1, 0, 1), (2, 1, 0)]);
        request.guest.attrs = vec![("cpu-pins".into(), "2 3".into())];
        assert_eq!(request.guest.pins(), [2, 3]);
    }
}
