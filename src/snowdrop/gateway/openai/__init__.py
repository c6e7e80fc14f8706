"""OpenAI's dialect at the gateway: `/v1/...`, where `model` names the deployment. Thin over the inner path."""
