//! One assigned PCI function as the guest sees it.
