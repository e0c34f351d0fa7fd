//! PCI configuration space, BARs, MSI-X and capabilities as state machines.
