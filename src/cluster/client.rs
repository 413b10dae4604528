//! The way to the API server.

use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use tower::ServiceBuilder;

/// When nothing was heard for so long, the other side is asked for a sign of life.
const QUIET: Duration = Duration::from_secs(10);
/// How long an answer to each of the questions, and to the wish for a connection, is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many questions may stay without an answer.
const QUESTIONS: u32 = 3;

/// A client of the API server that pod or kubeconfig name, and its address.
///
/// A watch sends nothing: when the API server's machine goes without a word and comes back, the connection looks well for
/// ever, and is given up after 5 minutes. So the kernel asks (TCP keepalive), and the watch fails after 25 s.
///
/// # Errors
/// When there is no configuration, or it makes no sense.
pub async fn connect() -> Result<(Client, String)> {
    let config = Config::infer().await.context(
        "no way to the API server: neither a ServiceAccount of a pod nor a kubeconfig is here",
    )?;
    let server = config.cluster_url.to_string();
    let client = client(config).context("cannot make a client of the API server")?;
    Ok((client, server))
}

fn client(config: Config) -> kube::Result<Client> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    // Tried anew so often: the kernel waits twice as long each time it asks, and would notice late that somebody answers.
    connector.set_connect_timeout(Some(PATIENCE));
    connector.set_nodelay(true);
    connector.set_keepalive(Some(QUIET));
    connector.set_keepalive_interval(Some(PATIENCE));
    connector.set_keepalive_retries(Some(QUESTIONS));
    // The same for what was sent and is not acknowledged.
    connector.set_tcp_user_timeout(Some(QUIET + PATIENCE * QUESTIONS));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .build::<_, Body>(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(tower::BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
