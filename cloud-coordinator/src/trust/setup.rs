//! The first admin, by a link that only who runs the coordinator can see; and the token for commands on its machine.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{
    Door, Trust, TrustError,
    audit::{Entry, Outcome},
    files,
    sessions::Grant,
};
use crate::{
    clock,
    records::{RecordError, commit},
};

/// Until the setup link runs out: whoever starts a coordinator is there. A restart makes a new one.
const LINK_MS: i64 = 3_600_000;

impl Trust {
    /// Makes what a start makes: the machine's token if there is none that is good, and the setup link as long as there
    /// is no admin.
    pub(crate) async fn start(&self, http: SocketAddr, door: Door) -> Result<(), TrustError> {
        let token = self.folder.join("operator.token");
        let good = match files::read(&token)? {
            Some(is) => self.is_the_machines(&is).await?,
            None => false,
        };
        if !good {
            let new = self.machine_token().await?;
            files::write(&token, new.as_bytes())?;
        }
        let path = self.folder.join("setup-link");
        files::remove(&path)?;
        if self.has_admin().await? {
            return Ok(());
        }
        let link = self.setup_link(http, door).await?;
        files::write(&path, format!("{link}\n").as_bytes())?;
        // Who reads this log may do anything to the coordinator anyway: it shows what the data folder holds.
        tracing::warn!(
            "there is no admin yet: open this within an hour to make the first one: {link}"
        );
        Ok(())
    }

    async fn setup_link(&self, http: SocketAddr, door: Door) -> Result<String, TrustError> {
        let mut writer = self.records.writer().await;
        let mut tx = writer.begin().await?;
        sqlx::query("DELETE FROM grants WHERE kind = 'setup'")
            .execute(&mut *tx)
            .await
            .map_err(RecordError::sql("take back the setup link"))?;
        let setup = Grant {
            kind: "setup",
            audience: "setup",
            owner: None,
            label: "the first admin",
            role: None,
            site: None,
            for_ms: LINK_MS,
        };
        let (_, token) = self.grant(&mut tx, setup).await?;
        commit(tx).await?;
        let scheme = if door.tls { "https" } else { "http" };
        Ok(format!("{scheme}://{}/setup#{token}", host(http)))
    }

    /// Makes the first admin, once.
    pub(crate) async fn set_up(
        &self,
        token: &str,
        name: &str,
        password: &str,
        from: &str,
    ) -> Result<(), TrustError> {
        let refused = |detail: String| async move {
            let line = Entry {
                who: from,
                action: "set up",
                object: name,
                outcome: Outcome::Refused,
                detail: &detail,
            };
            self.note(line).await;
        };
        let Some(claims) = self.key.read(token, "setup", clock::now_ms()) else {
            let why = "the link is none of this coordinator, or has run out: start it again for a new one";
            refused(why.into()).await;
            return Err(TrustError::Forbidden(why.into()));
        };
        let made = self.first_admin(&claims.jti, name, password).await;
        if let Err(error @ TrustError::Forbidden(_)) = &made {
            refused(error.to_string()).await;
        }
        made?;
        files::remove(&self.folder.join("setup-link"))?;
        Ok(())
    }
}

/// What a browser is to open: an address that listens everywhere is best reached by the machine's name.
fn host(http: SocketAddr) -> String {
    if !http.ip().is_unspecified() {
        return http.to_string();
    }
    let name = rustix::system::uname();
    match name.nodename().to_str() {
        Ok(name) if !name.is_empty() => format!("{name}:{}", http.port()),
        _ => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), http.port()).to_string(),
    }
}
