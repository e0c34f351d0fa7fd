//! The physical machine: inventory, IOMMU groups, claim, bind, reset.
