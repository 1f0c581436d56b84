//! The files of a release on their way to the disk: the model as a difference, if there is one, everything else in chunks.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufReader, BufWriter, Write},
    path::Path,
};

use mesh_core::{Digest, swarm::Source as Origin};
use models::{
    ReleaseFile,
    chunks::{Assembly, listed},
    delta::{self, DeltaError, Wanted},
};

use super::{
    disk::{Installed, Stage, is_file, write},
    error::UpdateError,
    fetch::{Fetch, MODEL},
    swarm::{Chunks, Delta, DeltaState, With, bring},
};

/// Files that are brought together: many small ones wait for neighbours as long as one does.
pub(super) const BATCH_BYTES: u64 = 4 << 20;

/// The files of a release that are on their way.
pub(super) struct Bringing<'a> {
    pub(super) fetch: &'a Fetch<'a>,
    pub(super) release: Digest,
    /// Of the whole release.
    pub(super) pieces: Vec<Digest>,
    pub(super) stage: &'a Stage,
    /// Bytes of files that are here, and of all.
    pub(super) done: u64,
    pub(super) total: u64,
}

impl Bringing<'_> {
    /// The model as a difference, if there is one; then the small files together, and each large one.
    pub(super) fn files(
        &mut self,
        mut missing: Vec<&ReleaseFile>,
        installed: &[Installed],
    ) -> Result<(), UpdateError> {
        let model = missing.iter().position(|file| file.path == MODEL);
        if let Some(at) = model.filter(|_| !self.fetch.without_delta)
            && let Some(file) = missing.get(at).copied()
            && self.difference(file, installed)?
        {
            missing.remove(at);
            self.has(&[file])?;
        }
        missing.sort_by_key(|file| file.length);
        let mut left = missing.as_slice();
        while !left.is_empty() {
            let mut bytes = 0;
            let together = left.iter().take_while(|file| {
                bytes += file.length;
                bytes <= BATCH_BYTES
            });
            let (batch, more) = left.split_at(together.count().max(1));
            self.batch(batch)?;
            self.has(batch)?;
            left = more;
        }
        Ok(())
    }

    /// These files are whole, and their chunks are not needed any more.
    fn has(&mut self, files: &[&ReleaseFile]) -> Result<(), UpdateError> {
        for file in files {
            self.fetch.show(file, &self.stage.file(&file.path)?);
            self.done += file.length;
        }
        self.fetch.watchful.progress(self.done, self.total);
        Ok(self.stage.drop_chunks()?)
    }

    fn with(&self) -> With<'_> {
        With {
            release: self.release,
            client: self.fetch.client,
            watchful: self.fetch.watchful,
            swarm: self.fetch.swarm,
            uplink: self.fetch.uplink,
        }
    }

    /// Brings some files in chunks.
    fn batch(&self, files: &[&ReleaseFile]) -> Result<(), UpdateError> {
        let chunks_of = |file: &ReleaseFile| listed(file.length, &file.chunks).unwrap_or_default();
        let chunks: Vec<_> = files.iter().flat_map(|file| chunks_of(file)).collect();
        let mut assembly = Assembly::new(chunks.clone());
        assembly.resume(&self.stage.chunks())?;
        let (mut all, mut left) = (0, 0);
        let missing: BTreeSet<Digest> = assembly.missing().map(|chunk| chunk.sha256).collect();
        for chunk in chunks {
            all += chunk.length as u64;
            if missing.contains(&chunk.sha256) {
                left += chunk.length as u64;
            } else if let Some(swarm) = self.fetch.swarm {
                swarm.put(chunk, self.stage);
            }
        }
        let mut there = all - left;
        let mut progress = |bytes: u64| {
            there += bytes;
            let done = (self.done + there).min(self.total);
            self.fetch.watchful.progress(done, self.total);
        };
        let swarm = self.fetch.swarm;
        let mut load = Chunks::new(
            &mut assembly,
            &self.pieces,
            self.stage,
            swarm,
            &mut progress,
        );
        bring(&mut load, &self.with())?;
        for file in files {
            self.put_together(file, &Assembly::new(chunks_of(file)))?;
        }
        Ok(())
    }

    fn put_together(&self, file: &ReleaseFile, assembly: &Assembly) -> Result<(), UpdateError> {
        let to = self.stage.file(&file.path)?;
        let mut trouble = None;
        let written = write(&to, |to| {
            assembly.write(&self.stage.chunks(), to).map_err(|error| {
                let words = error.to_string();
                trouble = Some(error);
                io::Error::other(words)
            })
        });
        if let Some(error) = trouble {
            return Err(error.into());
        }
        written?;
        if is_file(&to, file.length, file.sha256).unwrap_or(false) {
            return Ok(());
        }
        let path = &file.path;
        Err(UpdateError::Bytes(format!(
            "{path} is not what its chunks should make"
        )))
    }

    /// Makes the model from one that is here; false if there is no delta, or none that works.
    fn difference(&self, file: &ReleaseFile, installed: &[Installed]) -> Result<bool, UpdateError> {
        let mut assembly = Assembly::new(listed(file.length, &file.chunks).unwrap_or_default());
        assembly.resume(&self.stage.chunks())?;
        if assembly.is_complete() {
            return Ok(false);
        }
        let wanted = Wanted {
            length: file.length,
            sha256: file.sha256,
        };
        let to = self.stage.file(&file.path)?;
        for (old, path) in self.fetch.candidates(installed) {
            self.fetch.watch()?;
            let between = (old.sha256, file.sha256);
            let Some(from) = self.delta(between, file.length)? else {
                continue;
            };
            let made = self.apply(&path, &wanted, &to, from)?;
            if let (false, Some(swarm), Origin::Neighbour(peer)) = (made, self.fetch.swarm, from) {
                swarm.bad(peer);
            }
            self.keep(between, made)?;
            if made {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Brings a delta into the stage, and says from whom; nothing if there is none.
    fn delta(&self, between: (Digest, Digest), most: u64) -> Result<Option<Origin>, UpdateError> {
        let swarm = self.fetch.swarm;
        let of_neighbours_only = swarm.is_some_and(|swarm| swarm.is_in_the_site(self.release));
        let tell = |how| {
            if let Some(swarm) = swarm {
                swarm.set_delta(between, how);
            }
        };
        if !of_neighbours_only {
            tell(DeltaState::Coming);
        }
        let mut load = Delta {
            from: between.0,
            to: between.1,
            most,
            of_neighbours_only,
            path: self.stage.delta().into(),
            source: None,
        };
        match bring(&mut load, &self.with()) {
            Ok(()) => Ok(load.source),
            Err(UpdateError::NoDelta) => {
                tell(match of_neighbours_only {
                    true => DeltaState::No,
                    false => DeltaState::Nowhere,
                });
                Ok(None)
            }
            Err(error) => {
                tell(DeltaState::No);
                Err(error)
            }
        }
    }

    /// What became of a delta that came: neighbours may have it if it was good.
    fn keep(&self, between: (Digest, Digest), is_good: bool) -> Result<(), UpdateError> {
        let Some(swarm) = self.fetch.swarm else {
            return Ok(self.stage.drop_delta()?);
        };
        if is_good {
            self.fetch.disk.keep_delta(&self.stage.delta())?;
            swarm.set_delta(between, DeltaState::Here);
        } else {
            self.stage.drop_delta()?;
            swarm.set_delta(between, DeltaState::No);
        }
        Ok(())
    }

    /// Makes a file from an old one and the delta in the stage; false if it does not lead there.
    fn apply(
        &self,
        old: &Path,
        wanted: &Wanted,
        file: &Path,
        from: Origin,
    ) -> Result<bool, UpdateError> {
        let (Ok(mut old), Ok(delta)) = (File::open(old), File::open(self.stage.delta())) else {
            return Ok(false);
        };
        let mut trouble = None;
        let written = write(file, |to| {
            let mut to = BufWriter::new(to);
            let applied = delta::apply(&mut old, BufReader::new(delta), wanted, &mut to);
            match applied.and_then(|()| to.flush().map_err(DeltaError::Write)) {
                Ok(()) => Ok(()),
                // A full disk is for whoever writes the file to tell.
                Err(DeltaError::Write(error)) => Err(error),
                Err(error) => {
                    let words = error.to_string();
                    trouble = Some(error);
                    Err(io::Error::other(words))
                }
            }
        });
        match trouble {
            None => Ok(written.map(|()| true)?),
            Some(error) => {
                tracing::warn!(%error, ?from, "a delta is of no use; the file comes whole");
                Ok(false)
            }
        }
    }
}
