//! `/healthz` and `/readyz`: the body says why not.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;

use crate::report::Report;

pub fn router(report: Arc<Report>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(report)
}

async fn healthz(State(report): State<Arc<Report>>) -> (StatusCode, String) {
    answer(report.not_alive())
}

async fn readyz(State(report): State<Arc<Report>>) -> (StatusCode, String) {
    answer(report.not_ready())
}

fn answer(reason: Option<String>) -> (StatusCode, String) {
    match reason {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}
