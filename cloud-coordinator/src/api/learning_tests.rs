use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::trust::{Role, Who};

#[test]
fn who_may_see_one_site_hears_of_no_device_of_another() {
    let caller = |site: Option<&str>| Caller {
        who: Some(Who {
            principal: Principal::User {
                name: "ana".into(),
                role: Role::Viewer,
                site: site.map(|site| site.parse().unwrap()),
            },
            grant: String::new(),
            label: None,
            makes_tokens: false,
        }),
        address: IpAddr::V4(Ipv4Addr::LOCALHOST),
    };
    let job = Job {
        id: 1,
        task: "steel".into(),
        request: serde_json::Value::Null,
        state: "failed".into(),
        progress: None,
        model: None,
        error: Some("the dataset has samples of other/d2".into()),
        author: "machine".into(),
        created_ms: 0,
        started_ms: None,
        ended_ms: None,
    };
    let error = |site| seen_by(&caller(site), job.clone()).error.unwrap();
    assert!(error(None).contains("other/d2"));
    assert!(!error(Some("demo")).contains("other"));
}
