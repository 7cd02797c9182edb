//! What needs root or real programs.
