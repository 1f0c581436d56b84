use std::time::Duration;

use super::*;

const OLD: &str = "the old password";
const NEW: &str = "the new password";

async fn open() -> (tempfile::TempDir, Trust) {
    let dir = tempfile::tempdir().unwrap();
    let trust = Trust::open(dir.path()).await.unwrap();
    for (name, role) in [("root", Role::Admin), ("ana", Role::Operator)] {
        let new = NewUser {
            name: name.into(),
            password: OLD.into(),
            role,
            site: None,
        };
        trust.add_user("machine", &new).await.unwrap();
    }
    (dir, trust)
}

/// Lets a user change the own password, and does something else to that user while the change is on its way.
async fn meanwhile(trust: &Trust, sql: &'static str) -> Result<(), TrustError> {
    let mut writer = trust.records.writer().await;
    let own = {
        let trust = trust.clone();
        tokio::spawn(async move { trust.change_own_password("ana", OLD, NEW).await })
    };
    // It has checked the old password and hashed the new one, and waits to write.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!own.is_finished());
    let mut tx = writer.begin().await.unwrap();
    sqlx::query(sql).execute(&mut *tx).await.unwrap();
    commit(tx).await.unwrap();
    drop(writer);
    own.await.unwrap()
}

#[tokio::test]
async fn a_new_password_undoes_nothing_that_was_changed_meanwhile() {
    let (_dir, trust) = open().await;
    let demoted =
        "UPDATE users SET role = 'viewer', site = 'plant-3', disabled = 1 WHERE name = 'ana'";
    meanwhile(&trust, demoted).await.unwrap();
    let is = trust.user("ana").await.unwrap();
    assert_eq!(
        (is.role, is.site.as_deref(), is.disabled),
        (Role::Viewer, Some("plant-3"), true)
    );
}

#[tokio::test]
async fn who_knows_a_password_that_was_taken_away_sets_no_other() {
    let (_dir, trust) = open().await;
    let reset = "UPDATE users SET password = (SELECT password FROM users WHERE name = 'root') WHERE name = 'ana'";
    let done = meanwhile(&trust, reset).await;
    assert!(matches!(done, Err(TrustError::Wrong)), "{done:?}");
    assert!(trust.log_in("ana", NEW, "x").await.is_err());
}
