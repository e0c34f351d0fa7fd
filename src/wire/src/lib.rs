//! The typed messages between keep and cell.
