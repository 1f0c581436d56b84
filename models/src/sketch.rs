//! What a bare ONNX file says about itself, for whoever has to write a manifest for it.

use tract_onnx::{
    pb::{ModelProto, ValueInfoProto},
    prelude::*,
};

use crate::{
    analyse,
    engine::guarded,
    manifest::InputSpec,
    onnx::{self, OnnxError},
};

/// A value that goes into a graph or comes out of it, as the file declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its sizes, of which some may be open; nothing if the file does not declare a shape.
    pub sizes: Option<Vec<Option<usize>>>,
}

/// An ONNX file that is sound by itself: what goes in and what comes out. Nothing of it has been computed.
#[derive(Clone, Debug)]
pub struct Sketch {
    /// What has to be given at each run.
    pub inputs: Vec<Port>,
    /// What comes out.
    pub outputs: Vec<Port>,
    proto: ModelProto,
}

fn port(value: &ValueInfoProto) -> Port {
    let open = |sizes: Vec<Option<i64>>| {
        let size = |size: Option<i64>| size.and_then(|size| usize::try_from(size).ok());
        sizes.into_iter().map(size).collect()
    };
    Port {
        name: value.name.clone(),
        sizes: onnx::sizes(value.r#type.as_ref()).map(open),
    }
}

impl Sketch {
    /// Reads the bytes of an ONNX file, which may be hostile.
    ///
    /// # Errors
    /// If it is none, or one that no bundle may have, whatever its manifest says.
    pub fn read(model: &[u8]) -> Result<Self, OnnxError> {
        let proto = onnx::parse(model)?;
        let (inputs, outputs) = match &proto.graph {
            Some(graph) => (
                onnx::given(graph).map(port).collect(),
                graph.output.iter().map(port).collect(),
            ),
            None => (Vec::new(), Vec::new()),
        };
        Ok(Self {
            inputs,
            outputs,
            proto,
        })
    }

    /// The sizes of the outputs `names` for this input, as the graph computes them: what a file declares may be
    /// open. The graph is analysed within the bounds of [`crate::Engine::load`].
    ///
    /// # Errors
    /// If the input or an output is not the graph's, or the engine cannot take the graph.
    pub fn output_sizes(
        mut self,
        input: &InputSpec,
        names: &[String],
    ) -> Result<Vec<Vec<usize>>, OnnxError> {
        onnx::fit(&mut self.proto, input, names)?;
        let proto = self.proto;
        guarded(move || {
            let typed = analyse::model(proto)?;
            let sizes = |at: usize| {
                let fact = typed.output_fact(at).map_err(|e| format!("{e:#}"))?;
                let size = |dim: &TDim| {
                    dim.to_i64()
                        .ok()
                        .and_then(|dim| usize::try_from(dim).ok())
                        .ok_or_else(|| format!("the size of output {:?} is open", names[at]))
                };
                fact.shape.iter().map(size).collect()
            };
            (0..names.len()).map(sizes).collect()
        })
        .map_err(OnnxError::Unreadable)
    }
}
