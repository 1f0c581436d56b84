//! An independent count of what was produced and what arrived.
//!
//! None of the parts under test counts for itself here. What was *produced* is what the sources wrote
//! into their journals before anything else saw the frame. What was *stored* is what lies in the
//! coordinator's database file, read without asking the coordinator. One frame is one reading, since the
//! fleet publishes all.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_core::{GapReason, RangeSet};
use serde::Serialize;
use sqlx::{
    Connection, Row, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteRow},
};

/// Rows that are read at once: some MiB.
const ROWS: i64 = 10_000;
/// The coordinator holds its locks for one commit; recovery after a kill takes longer.
const BUSY: Duration = Duration::from_secs(10);

/// What went wrong while counting.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// A journal cannot be read.
    #[error("reading the journal {path}: {source}")]
    Journal {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A journal holds something else than frame numbers.
    #[error("the journal {path} holds {line:?}, which is no frame number")]
    Line {
        /// Which.
        path: PathBuf,
        /// What.
        line: String,
    },
    /// The coordinator's database cannot be read.
    #[error("reading the coordinator's database {path}: {source}")]
    Database {
        /// Where.
        path: PathBuf,
        /// Why.
        source: sqlx::Error,
    },
}

/// Where a source notes each frame that leaves it.
#[derive(Clone, Debug)]
pub struct Journal {
    /// The device that the source belongs to.
    pub device: String,
    /// The source's name.
    pub source: String,
    /// The file.
    pub path: PathBuf,
}

/// The last reading of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Last {
    /// What the model said.
    pub label: String,
    /// How sure it was.
    pub score: f64,
    /// What it really was, where that is known.
    pub truth: Option<String>,
}

/// What is known of one device, or of all together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Account {
    /// Frames that left a source.
    pub produced: u64,
    /// Readings in the database.
    pub stored: u64,
    /// … of them, those that came from a backlog.
    pub replayed: u64,
    /// Readings in the database that say the same as another.
    pub duplicates: u64,
    /// Readings that are recorded as missing.
    pub gaps: u64,
    /// The same by the reason that is given.
    pub gap_reasons: BTreeMap<String, u64>,
    /// Frames that are neither stored nor covered by a gap whose length is known. One of a damaged store only says how many
    /// readings there were at most: it excuses nothing.
    pub lost: u64,
    /// Stored readings of frames that never left a source.
    pub invented: u64,
    /// Stored readings whose truth is known …
    pub judged: u64,
    /// … and those of them that are right.
    pub right: u64,
    /// The same for frames from files that the model was never trained on.
    pub judged_held_out: u64,
    /// … and right.
    pub right_held_out: u64,
    /// The last reading.
    #[serde(skip)]
    pub last: Option<Last>,
}

impl Account {
    /// Readings that have not arrived yet, or never will.
    #[must_use]
    pub const fn missing(&self) -> u64 {
        (self.produced + self.duplicates + self.invented).saturating_sub(self.stored)
    }

    /// Readings in gaps whose length is known.
    fn counted_gaps(&self) -> u64 {
        let at_most = GapReason::Corrupt.as_str();
        self.gaps - self.gap_reasons.get(at_most).copied().unwrap_or(0)
    }

    /// Was everything stored once, or recorded as dropped?
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.lost == 0 && self.duplicates == 0 && self.invented == 0
    }

    /// The part of the judged readings that is right, 0..=1.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        (self.judged > 0).then(|| self.right as f64 / self.judged as f64)
    }

    /// The same on files that the model was never trained on.
    #[must_use]
    pub fn accuracy_held_out(&self) -> Option<f64> {
        (self.judged_held_out > 0).then(|| self.right_held_out as f64 / self.judged_held_out as f64)
    }

    fn add(&mut self, other: &Self) {
        self.produced += other.produced;
        self.stored += other.stored;
        self.replayed += other.replayed;
        self.duplicates += other.duplicates;
        self.gaps += other.gaps;
        for (reason, count) in &other.gap_reasons {
            *self.gap_reasons.entry(reason.clone()).or_default() += count;
        }
        self.lost += other.lost;
        self.invented += other.invented;
        self.judged += other.judged;
        self.right += other.right;
        self.judged_held_out += other.judged_held_out;
        self.right_held_out += other.right_held_out;
    }
}

/// What the witness has to say.
#[derive(Clone, Debug, Default)]
pub struct Testimony {
    /// Each device by its name.
    pub devices: BTreeMap<String, Account>,
}

impl Testimony {
    /// All devices together.
    #[must_use]
    pub fn total(&self) -> Account {
        let mut total = Account::default();
        self.devices.values().for_each(|a| total.add(a));
        total
    }
}

/// One source as the witness knows it.
#[derive(Debug, Default)]
struct Frames {
    journal: Option<PathBuf>,
    read: u64,
    produced: RangeSet,
    stored: RangeSet,
}

/// Reads journals and database, each time only what is new.
#[derive(Debug)]
pub struct Witness {
    database: PathBuf,
    held_out: BTreeSet<String>,
    frames: BTreeMap<(String, String), Frames>,
    accounts: BTreeMap<String, Account>,
    last_row: i64,
}

impl Witness {
    /// A witness that has seen nothing yet. `database` is the coordinator's, `held_out` names the files
    /// that the model was never trained on.
    #[must_use]
    pub fn new(
        database: PathBuf,
        journals: impl IntoIterator<Item = Journal>,
        held_out: BTreeSet<String>,
    ) -> Self {
        let mut accounts = BTreeMap::new();
        let mut frames = BTreeMap::new();
        for journal in journals {
            accounts.insert(journal.device.clone(), Account::default());
            let entry = Frames {
                journal: Some(journal.path),
                ..Frames::default()
            };
            frames.insert((journal.device, journal.source), entry);
        }
        Self {
            database,
            held_out,
            frames,
            accounts,
            last_row: 0,
        }
    }

    /// Looks at what is there now.
    ///
    /// The database is read before the journals: a frame is in its journal before it can be stored, so
    /// that nothing can look invented which is only new.
    ///
    /// # Errors
    /// [`WitnessError`] if something cannot be read. A file that is not there yet holds nothing.
    pub async fn look(&mut self) -> Result<Testimony, WitnessError> {
        if self.database.exists() {
            let read = self.read_database().await;
            read.or_else(|source| match source {
                // The coordinator has made the file and not yet its tables.
                sqlx::Error::Database(e) if e.message().contains("no such table") => Ok(()),
                source => Err(WitnessError::Database {
                    path: self.database.clone(),
                    source,
                }),
            })?;
        }
        for frames in self.frames.values_mut() {
            frames.read_journal()?;
        }
        Ok(self.testimony())
    }

    /// Looks again and again until everything produced is stored or recorded as dropped, at most for
    /// `bound`; then once more a moment later, so that nothing that arrives twice goes unseen.
    ///
    /// # Errors
    /// As [`Witness::look`].
    pub async fn settle(&mut self, bound: Duration) -> Result<Testimony, WitnessError> {
        /// Ten times what the coordinator takes to commit a batch.
        const AGAIN: Duration = Duration::from_millis(200);
        let until = tokio::time::Instant::now() + bound;
        while tokio::time::Instant::now() < until {
            let total = self.look().await?.total();
            if total.lost == 0 && total.stored + total.gaps >= total.produced {
                break;
            }
            tokio::time::sleep(AGAIN).await;
        }
        tokio::time::sleep(5 * AGAIN).await;
        self.look().await
    }

    /// The number after the last frame in a device's journals; 0 if there is none.
    #[must_use]
    pub fn next_frame(&self, device: &str) -> u64 {
        let of_device = self.frames.iter().filter(|((d, _), _)| d == device);
        let last = of_device
            .filter_map(|(_, frames)| frames.produced.last())
            .max();
        last.map_or(0, |frame| frame + 1)
    }

    async fn read_database(&mut self) -> Result<(), sqlx::Error> {
        // Opened anew each time: a connection that stays would keep the write-ahead log alive over the
        // coordinator's death and spare it the recovery that is to be tested.
        let options = SqliteConnectOptions::new()
            .filename(&self.database)
            .read_only(true)
            .busy_timeout(BUSY);
        let mut database = SqliteConnection::connect_with(&options).await?;
        let read = self.read_rows(&mut database).await;
        database.close().await?;
        read
    }

    async fn read_rows(&mut self, database: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        loop {
            let rows = sqlx::query(
                "SELECT r.id, d.device, r.source, r.frame, r.replayed, r.label, r.score, r.truth, r.file \
                 FROM readings r JOIN devices d ON d.id = r.device WHERE r.id > ? ORDER BY r.id LIMIT ?",
            )
            .bind(self.last_row)
            .bind(ROWS)
            .fetch_all(&mut *database)
            .await?;
            for row in &rows {
                self.count(row)?;
            }
            if rows.is_empty() {
                break;
            }
        }
        let gaps = sqlx::query(
            "SELECT d.device, g.reason, CAST(SUM(g.to_seq - g.from_seq + 1) AS INTEGER) AS length \
             FROM gaps g JOIN devices d ON d.id = g.device GROUP BY d.device, g.reason",
        )
        .fetch_all(database)
        .await?;
        for account in self.accounts.values_mut() {
            account.gaps = 0;
            account.gap_reasons.clear();
        }
        for row in gaps {
            let account = self.accounts.entry(row.try_get("device")?).or_default();
            let length = row.try_get::<i64, _>("length")?.unsigned_abs();
            account.gaps += length;
            account.gap_reasons.insert(row.try_get("reason")?, length);
        }
        Ok(())
    }

    fn count(&mut self, row: &SqliteRow) -> Result<(), sqlx::Error> {
        self.last_row = row.try_get("id")?;
        let device: String = row.try_get("device")?;
        let source: String = row.try_get("source")?;
        let frame = row.try_get::<i64, _>("frame")?.unsigned_abs();
        let label: String = row.try_get("label")?;
        let truth: Option<String> = row.try_get("truth")?;
        let file: Option<String> = row.try_get("file")?;

        let frames = self.frames.entry((device.clone(), source)).or_default();
        let account = self.accounts.entry(device).or_default();
        account.stored += 1;
        account.replayed += u64::from(row.try_get::<bool, _>("replayed")?);
        if frames.stored.contains(frame) {
            account.duplicates += 1;
        }
        frames.stored.insert(frame, frame);
        if let Some(truth) = &truth {
            let right = u64::from(*truth == label);
            account.judged += 1;
            account.right += right;
            if file.is_some_and(|f| self.held_out.contains(&f)) {
                account.judged_held_out += 1;
                account.right_held_out += right;
            }
        }
        account.last = Some(Last {
            label,
            score: row.try_get("score")?,
            truth,
        });
        Ok(())
    }

    fn testimony(&self) -> Testimony {
        let mut devices = self.accounts.clone();
        for account in devices.values_mut() {
            (account.produced, account.invented, account.lost) = (0, 0, 0);
        }
        for ((device, _), frames) in &self.frames {
            let account = devices.entry(device.clone()).or_default();
            account.produced += frames.produced.len();
            account.invented += without(&frames.stored, &frames.produced);
            account.lost += without(&frames.produced, &frames.stored);
        }
        for account in devices.values_mut() {
            account.lost = account.lost.saturating_sub(account.counted_gaps());
        }
        Testimony { devices }
    }
}

/// How many of `these` are not in `those`.
fn without(these: &RangeSet, those: &RangeSet) -> u64 {
    let mut left = these.clone();
    for (from, to) in those.iter() {
        left.remove(from, to);
    }
    left.len()
}

impl Frames {
    fn read_journal(&mut self) -> Result<(), WitnessError> {
        let Some(path) = &self.journal else {
            return Ok(());
        };
        let mut text = String::new();
        match read_from(path, self.read, &mut text) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            read => read.map_err(|source| WitnessError::Journal {
                path: path.clone(),
                source,
            })?,
        }
        // A line without its end was cut by a kill before anything else saw the frame, or is being
        // written just now.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        for line in text.get(..whole).unwrap_or_default().lines() {
            let frame = line.parse().map_err(|_| WitnessError::Line {
                path: path.clone(),
                line: line.chars().take(40).collect(),
            })?;
            self.produced.insert(frame, frame);
        }
        self.read += whole as u64;
        Ok(())
    }
}

fn read_from(path: &Path, from: u64, to: &mut String) -> io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    file.read_to_string(to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    async fn database(path: &Path) -> SqliteConnection {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true);
        let mut db = SqliteConnection::connect_with(&options).await.unwrap();
        for statement in [
            "PRAGMA journal_mode = WAL",
            "CREATE TABLE devices(id INTEGER PRIMARY KEY, site TEXT, device TEXT)",
            "CREATE TABLE readings(id INTEGER PRIMARY KEY, device INTEGER, epoch INTEGER, seq INTEGER, source TEXT, \
             frame INTEGER, label TEXT, score REAL, truth TEXT, file TEXT, replayed INTEGER)",
            "CREATE TABLE gaps(device INTEGER, epoch INTEGER, from_seq INTEGER, to_seq INTEGER, reason TEXT)",
            "INSERT INTO devices VALUES (4, 's', 'd1'), (9, 's', 'd2')",
        ] {
            sqlx::query(statement).execute(&mut db).await.unwrap();
        }
        db
    }

    async fn store(
        db: &mut SqliteConnection,
        device: i64,
        frame: i64,
        truth: Option<&str>,
        replayed: bool,
    ) {
        sqlx::query(
            "INSERT INTO readings(device, epoch, seq, source, frame, label, score, truth, file, replayed) \
             VALUES (?, 1, ?, 'cam0', ?, 'ok', 0.5, ?, 'a/1.png', ?)",
        )
        .bind(device)
        .bind(frame + 1)
        .bind(frame)
        .bind(truth)
        .bind(replayed)
        .execute(db)
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn counts_what_it_sees_and_only_that() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.db");
        let journal = |device: &str| Journal {
            device: device.into(),
            source: "cam0".into(),
            path: dir.path().join(device),
        };
        let held_out = BTreeSet::from(["a/1.png".to_owned()]);
        let mut witness = Witness::new(path.clone(), ["d1", "d2"].map(journal), held_out);
        assert_eq!(witness.look().await.unwrap().total(), Account::default());

        let mut db = database(&path).await;
        let mut d1 = std::fs::File::create(dir.path().join("d1")).unwrap();
        // Frame 2 twice: the device was killed between its journal and its outbox. 77 is cut short.
        d1.write_all(b"0\n1\n2\n2\n3\n4\n77").unwrap();
        store(&mut db, 4, 0, Some("ok"), false).await;
        store(&mut db, 4, 1, Some("hole"), true).await;
        store(&mut db, 4, 1, None, true).await;
        store(&mut db, 9, 5, None, false).await;
        sqlx::query("INSERT INTO gaps VALUES (4, 1, 3, 4, 'full')")
            .execute(&mut db)
            .await
            .unwrap();
        let seen = witness.look().await.unwrap();
        let d1_account = &seen.devices["d1"];
        assert_eq!((d1_account.produced, d1_account.stored), (5, 3));
        assert_eq!((d1_account.replayed, d1_account.duplicates), (2, 1));
        assert_eq!((d1_account.gaps, d1_account.lost), (2, 1));
        assert_eq!(d1_account.accuracy(), Some(0.5));
        assert_eq!(d1_account.accuracy_held_out(), Some(0.5));
        assert_eq!(seen.devices["d2"].invented, 1);
        assert!(!seen.total().is_whole());

        // Only what is new is read, and it adds up.
        d1.write_all(b"\n").unwrap();
        store(&mut db, 4, 77, None, false).await;
        let seen = witness.look().await.unwrap();
        assert_eq!(
            (seen.devices["d1"].produced, seen.devices["d1"].stored),
            (6, 4)
        );
        assert_eq!(
            (seen.devices["d1"].lost, seen.devices["d1"].invented),
            (1, 0)
        );
    }

    /// A damaged store may have held less than its gap says: it is no excuse for what is missing.
    #[tokio::test]
    async fn a_gap_that_is_only_a_bound_excuses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.db");
        let journal = Journal {
            device: "d1".into(),
            source: "cam0".into(),
            path: dir.path().join("d1"),
        };
        let mut witness = Witness::new(path.clone(), [journal], BTreeSet::new());
        let mut db = database(&path).await;
        std::fs::write(dir.path().join("d1"), "0\n1\n2\n3\n").unwrap();
        store(&mut db, 4, 0, None, false).await;
        for gap in ["(4, 1, 2, 2, 'full')", "(4, 1, 3, 900, 'corrupt')"] {
            let sql = format!("INSERT INTO gaps VALUES {gap}");
            sqlx::query(sqlx::AssertSqlSafe(sql))
                .execute(&mut db)
                .await
                .unwrap();
        }
        for _ in 0..2 {
            let total = witness.look().await.unwrap().total();
            assert_eq!((total.gaps, total.lost), (899, 2), "{total:?}");
            assert_eq!(total.gap_reasons["full"], 1);
            assert!(!total.is_whole());
        }
    }

    #[tokio::test]
    async fn says_what_it_cannot_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        std::fs::write(&path, "1\nx\n").unwrap();
        let journal = Journal {
            device: "d1".into(),
            source: "cam0".into(),
            path,
        };
        let mut witness = Witness::new(dir.path().join("none.db"), [journal], BTreeSet::new());
        assert!(matches!(
            witness.look().await,
            Err(WitnessError::Line { .. })
        ));
    }
}
