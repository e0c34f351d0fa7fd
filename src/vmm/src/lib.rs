//! The virtual machine monitor that runs inside a cell.
