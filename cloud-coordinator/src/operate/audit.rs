//! `audit …`: works on the coordinator's folder, also while it runs. Whoever runs the API could make it say anything.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Subcommand;

use crate::{
    Config,
    records::Records,
    trust::audit::{self, Head},
};

/// The log of who did what.
#[derive(Subcommand)]
pub(crate) enum AuditCommand {
    /// Goes through the whole log and says the first line that is not as it was written, or how many there are and the
    /// head, which is worth writing down elsewhere: with it also a log whose end was cut off is found.
    ///
    /// Example: cloud-coordinator audit verify --head 1042:9f86d081…
    Verify {
        /// A head of before, COUNT:HASH.
        #[arg(long, value_name = "COUNT:HASH")]
        head: Option<Head>,
        /// The coordinator's configuration, which says where its data folder is.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// The coordinator's data folder.
        #[arg(
            long,
            value_name = "DIR",
            env = "LACEWING_COORDINATOR_DATA",
            default_value = "lacewing-data"
        )]
        data: PathBuf,
    },
}

/// Does what `audit …` asks for.
pub(crate) async fn audit(command: AuditCommand) -> anyhow::Result<()> {
    let AuditCommand::Verify { head, config, data } = command;
    let data = match config {
        Some(config) => Config::read(Some(&config), false)?.data,
        None => data,
    };
    verify(&data, head.as_ref()).await
}

async fn verify(data: &Path, remembered: Option<&Head>) -> anyhow::Result<()> {
    let file = data.join("trust.db");
    if !file.exists() {
        bail!(
            "there is no {}: name the folder with --data",
            file.display()
        );
    }
    let records = Records::trust(data).await?;
    let verified = audit::verify(&records, remembered).await;
    records.close().await;
    match verified? {
        Ok(head) => {
            println!("every line is as it was written; the head is {head}");
            Ok(())
        }
        Err(broken) => bail!("the audit log was tampered with: {broken}"),
    }
}
