//! The recorded graph as text for Graphviz (`dot -Tsvg`).

use crate::tape::Tape;
use std::collections::HashMap;
use std::fmt::Write;

impl Tape {
    /// The graph recorded so far in the DOT language: ops as boxes, inputs as ellipses, parameters as filled ellipses,
    /// the shape of each value on its edge. Constants are left out: no gradient reaches them.
    pub fn to_dot(&self) -> String {
        let (nodes, slots) = (self.nodes.borrow(), self.slots.borrow());
        let makers: HashMap<usize, usize> =
            nodes.iter().enumerate().flat_map(|(op, node)| node.outputs.iter().map(move |slot| (slot.0, op))).collect();
        let mut text = String::from("digraph tape {\n  rankdir=TB;\n  node [fontname=\"sans-serif\"];\n");
        for (index, state) in slots.iter().enumerate().filter(|(slot, _)| !makers.contains_key(slot)) {
            let (label, style) = match &state.parameter {
                Some(parameter) => (format!("parameter {}", parameter.id.0), ", style=filled, fillcolor=lightgrey"),
                None => ("input".to_owned(), ""),
            };
            let _ = writeln!(text, "  leaf{index} [label=\"{label}\\n{}\"{style}];", state.shape);
        }
        for (index, node) in nodes.iter().enumerate() {
            let _ = writeln!(text, "  op{index} [shape=box, label=\"{}\"];", node.name);
            for slot in node.inputs.iter().flatten() {
                let source = makers.get(&slot.0).map_or(format!("leaf{}", slot.0), |op| format!("op{op}"));
                let _ = writeln!(text, "  {source} -> op{index} [label=\"{}\"];", slots[slot.0].shape);
            }
        }
        text.push_str("}\n");
        text
    }
}
