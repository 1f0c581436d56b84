//! The synthetic camera: a scene that is drawn, as a source.

use models::Picture;

use super::{
    Shot, Source,
    scene::{SceneConfig, draw},
};

/// Shows the scene, for ever.
#[derive(Debug)]
pub(crate) struct Synthetic {
    config: SceneConfig,
}

impl Synthetic {
    /// Looks at the scene.
    #[must_use]
    pub(crate) const fn new(config: SceneConfig) -> Self {
        Self { config }
    }
}

impl Source for Synthetic {
    fn shoot(&mut self, number: u64) -> Shot {
        let (image, truth) = draw(&self.config, number);
        match Picture::from_rgb(image.width(), image.height(), image.into_raw()) {
            Ok(picture) => Shot::Picture {
                picture,
                original: None,
                file: None,
                truth: Some(truth.label.to_owned()),
            },
            Err(error) => Shot::Bad {
                why: error.to_string(),
            },
        }
    }
}
