//! Comes to the model that the coordinator wishes for, and back by itself.

pub mod registry;
