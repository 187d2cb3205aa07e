"""Keys and tokens that their makers gave a form of their own, so that scanners can find them.

The forms are those that the makers document; the list was checked against gitleaks' published rules (config/gitleaks.toml).
A row: kind, the literals that lead to it (case ignored), the form (case counts). The literal stands at the start of the form,
or as many characters behind it as `LEADS` says.
"""

import base64
import re
from collections.abc import Callable, Iterator

from mlx_finetune.data.redaction import Found
from mlx_finetune.data.redaction.values import is_marked

Rule = Callable[[str, int], Iterator[Found]]

# No letter or digit before it, but for the letter of an escape (in JSON text a token may follow \n) or Telegram's /bot.
BEGIN = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=/bot))"
END = r"(?![A-Za-z0-9])"
BOT_IDS = " ".join(sorted({base64.b64encode(str(number).encode()).decode() for number in range(100, 1000)}))
LONGEST = 2000  # characters of a part: a search that fails must not read to the end of the text each time
LONGEST_PART = 20_000  # of a JWT, which another part must follow
ALPHABET = re.compile(r"(\[[^\]]+\]|\\[wd])\{\d+,?\d*\}")
JWT_HEAD = r"eyJ[\w-]{10,8000}+"
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"

FORMS = [
    # models and data
    ("anthropic_key", "sk-ant-", r"sk-ant-[\w-]{20,}"),
    ("openrouter_key", "sk-or-", r"sk-or-[\w-]{20,}"),
    ("openai_key", "sk-proj- sk-svcacct- sk-admin- sk-none-", r"sk-(?:proj|svcacct|admin|None)-[\w-]{20,}"),
    ("openai_key", "sk-", r"sk-(?=[A-Za-z]{0,40}\d)[A-Za-z0-9]{20,}(?![\w-])"),
    ("api_key", "sk-", r"sk-(?!ant-|or-|proj-|admin-)[a-z]{2,8}-(?=[A-Za-z-]{0,40}\d)(?:[A-Za-z0-9]{24,}|" + UUID + r")(?![\w-])"),
    ("huggingface_token", "hf_ api_org_", r"(?:hf|api_org)_[A-Za-z0-9]{30,}(?!\w)"),
    ("groq_key", "gsk_", r"gsk_[A-Za-z0-9]{40,}"),
    ("xai_key", "xai-", r"xai-[A-Za-z0-9]{40,}"),
    ("replicate_token", "r8_", r"r8_[A-Za-z0-9]{30,}"),
    ("perplexity_key", "pplx-", r"pplx-[A-Za-z0-9]{32,}"),
    ("nvidia_key", "nvapi-", r"nvapi-[\w-]{40,}"),
    ("together_key", "tgp_v1_", r"tgp_v1_[\w-]{30,}"),
    ("fireworks_key", "fw_", r"fw_(?=[A-Za-z]{0,40}\d)[A-Za-z0-9]{22,}(?!\w)"),
    ("cerebras_key", "csk-", r"csk-[a-z0-9]{40,}"),
    ("jina_key", "jina_", r"jina_[A-Za-z0-9_-]{40,}"),
    ("tavily_key", "tvly-", r"tvly-[\w-]{20,}"),
    ("firecrawl_key", "fc-", r"fc-[0-9a-f]{32}" + END),
    ("langsmith_key", "lsv2_", r"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}"),
    ("wandb_key", "wandb_v1_", r"wandb_v1_\w{40,}"),
    ("pinecone_key", "pcsk_", r"pcsk_\w{40,}"),
    # clouds
    ("aws_access_key", "akia asia abia acca", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}" + END),
    ("aws_bedrock_key", "absk bedrock-api-key-", r"(?:ABSK[A-Za-z0-9+/]{90,}={0,2}|bedrock-api-key-[A-Za-z0-9+/=]{30,})"),
    ("aws_mws_key", "amzn.mws.", r"amzn\.mws\." + UUID),
    ("google_api_key", "aiza", r"AIza[\w-]{35}(?![\w-])"),
    ("google_oauth", "ya29. gocspx- 1//0", r"(?:ya29\.[\w.-]{20,}|GOCSPX-[\w-]{20,}|1//0[\w-]{30,})"),
    ("azure_secret", " ".join(f"{digit}q~" for digit in range(10)), r"[A-Za-z0-9_~.]{3}\dQ~[A-Za-z0-9_~.-]{31,34}(?![\w~.-])"),
    ("alibaba_key", "ltai", r"LTAI[A-Za-z0-9]{12,24}" + END),
    ("digitalocean_token", "doo_v1_ dop_v1_ dor_v1_", r"do[opr]_v1_[0-9a-f]{64}"),
    ("cloudflare_key", "v1.0-", r"v1\.0-[0-9a-f]{24}-[0-9a-f]{146}"),
    ("databricks_token", "dapi", r"dapi[0-9a-f]{32}(?:-\d)?" + END),
    ("fly_token", "fo1_ fm1 fm2_", r"(?:fo1_[\w-]{40,}|fm(?:1[ar]|2)_[A-Za-z0-9+/]{60,}={0,3})"),
    ("heroku_key", "hrku-", r"HRKU-[\w-]{36,}"),
    ("render_key", "rnd_", r"rnd_[A-Za-z0-9]{28,}(?!\w)"),
    ("netlify_token", "nfp_", r"nfp_[A-Za-z0-9]{36}"),
    ("planetscale_token", "pscale_", r"pscale_(?:tkn|oauth|pw)_[\w.=-]{32,}"),
    ("supabase_key", "sbp_ sb_secret_", r"(?:sbp_[0-9a-f]{40}|sb_secret_[\w-]{20,})"),
    ("scalingo_token", "tk-us-", r"tk-us-[\w-]{48}"),
    ("tailscale_key", "tskey-", r"tskey-[a-z]+-[A-Za-z0-9-]{20,}"),
    ("openshift_token", "sha256~", r"sha256~[\w-]{43}"),
    ("dropbox_token", "sl.", r"sl\.[\w-]{60,}"),
    # code, packages, builds
    ("github_token", "ghp_ gho_ ghu_ ghs_ ghr_", r"gh[pousr]_[A-Za-z0-9]{30,255}"),
    ("github_token", "github_pat_", r"github_pat_\w{40,255}"),
    (
        "gitlab_token",
        "glpat- gldt- glrt- glcbt- glptt- glft- glsoat- glimt- glagent- gloas- glffct- gr1348941",
        r"(?:gl(?:pat|dt|rt|cbt|ptt|ft|soat|imt|agent|oas|ffct)-[\w-]{20,}(?:\.[0-9a-z]{9})?|GR1348941[\w-]{20})",
    ),
    ("bitbucket_token", "atbb", r"ATBB[A-Za-z0-9]{28,}"),
    ("atlassian_token", "atatt3 atctt3", r"AT[AC]TT3[\w=-]{60,}"),
    ("sourcegraph_token", "sgp_", r"sgp_(?:[0-9a-fA-F]{16}_|local_)?[0-9a-fA-F]{40}"),
    ("npm_token", "npm_", r"npm_[A-Za-z0-9]{36}" + END),
    ("pypi_token", "pypi-", r"pypi-[\w-]{50,}"),
    ("rubygems_key", "rubygems_", r"rubygems_[0-9a-f]{48}"),
    ("cargo_token", "cio", r"cio(?=[A-Za-z]{0,40}\d)[A-Za-z0-9]{32}(?!\w)"),
    ("clojars_token", "clojars_", r"CLOJARS_[0-9a-z]{60}"),
    ("docker_token", "dckr_", r"dckr_[po]at_[\w-]{20,}"),
    ("artifactory_key", "akcp cmvmd", r"(?:AKCp[A-Za-z0-9]{69}|cmVmd[A-Za-z0-9]{59})" + END),
    ("pulumi_token", "pul-", r"pul-[0-9a-f]{40}" + END),
    ("terraform_token", ".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,}"),
    ("sonar_token", "sqa_ sqp_ squ_", r"sq[apu]_[0-9a-f]{40}" + END),
    ("buildkite_token", "bkua_", r"bkua_[0-9a-f]{40}" + END),
    ("circleci_token", "ccipat_", r"CCIPAT_\w{40,}"),
    ("octopus_key", "api-", r"API-[A-Z0-9]{26}" + END),
    ("prefect_key", "pnu_ pnb_", r"pn[ub]_[A-Za-z0-9]{36}" + END),
    ("vault_token", "hvs. hvb. hvr.", r"hv[sbr]\.[\w-]{24,}"),
    ("doppler_token", "dp.", r"dp\.(?:pt|st|ct|sa|scim|audit)\.(?:[\w-]+\.)?[A-Za-z0-9]{40,}"),
    ("onepassword_key", "a3- ops_eyj", r"(?:A3-[A-Z0-9]{6}-[A-Z0-9-]{11,13}(?:-[A-Z0-9]{5}){3}|ops_eyJ[\w+/=]{100,})"),
    ("infracost_key", "ico-", r"ico-[A-Za-z0-9]{32}" + END),
    # talk, mail, money, monitoring
    (
        "slack_token",
        "xoxa- xoxb- xoxc- xoxd- xoxe xoxo- xoxp- xoxr- xoxs-",
        r"xox[abcdeoprs](?:\.xox[bp])?-(?=[A-Za-z-]{0,20}[\d%])[\w%+/=-]{10,}",
    ),
    ("slack_token", "xapp-", r"xapp-\d-[A-Za-z0-9-]{20,}"),
    ("slack_webhook", "hooks.slack.com/", r"hooks\.slack\.com/(?:services|workflows|triggers)/[A-Za-z0-9+/]{20,}"),
    ("teams_webhook", "webhook.office.com/", r"webhook\.office\.com/webhookb2/[\w@/-]{60,}"),
    ("discord_webhook", "api/webhooks/", r"api/webhooks/\d{15,20}/(?P<secret>[\w-]{50,})"),
    ("discord_token", BOT_IDS, r"[MNO][\w-]{22,27}\.[\w-]{6}\.[\w-]{27,45}(?![\w-])"),
    ("telegram_token", ":aa", r"\d{8,10}:AA[\w-]{32,34}(?![\w-])"),
    ("sendgrid_key", "sg.", r"SG\.[\w-]{16,}\.[\w-]{32,}"),
    ("brevo_key", "xkeysib-", r"xkeysib-[0-9a-f]{64}-[A-Za-z0-9]{16}"),
    ("mailgun_key", "key-", r"(?<![\w-])key-[0-9a-f]{32}" + END),
    ("mailchimp_key", " ".join(f"-us{digit}" for digit in range(1, 10)), r"[0-9a-f]{32}-us\d{1,2}" + END),
    ("twilio_key", " ".join(f"sk{digit}" for digit in "0123456789abcdef"), r"SK[0-9a-f]{32}" + END),
    ("stripe_key", "sk_live_ sk_test_ sk_prod_ rk_live_ rk_test_ rk_prod_", r"[sr]k_(?:live|test|prod)_[A-Za-z0-9]{10,}"),
    ("stripe_key", "whsec_", r"whsec_[A-Za-z0-9+/=]{24,}"),
    ("square_token", "sq0atp- sq0csp- eaaa", r"(?:sq0(?:atp|csp)-[\w-]{22,}|EAAA[\w-]{60}(?![\w-]))"),
    ("shopify_token", "shpat_ shpca_ shppa_ shpss_", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}"),
    ("shippo_token", "shippo_", r"shippo_(?:live|test)_[0-9a-fA-F]{40}"),
    ("easypost_key", "ezak eztk", r"EZ[AT]K[A-Za-z0-9]{54}"),
    ("duffel_token", "duffel_", r"duffel_(?:test|live)_[\w=-]{43}"),
    ("flutterwave_key", "flwseck", r"FLWSECK(?:_TEST)?-[0-9a-zA-Z]{12,}(?:-X)?"),
    ("facebook_token", "eaa", r"EAA[A-Za-z0-9]{80,}"),
    ("notion_token", "ntn_ secret_", r"(?:ntn_[A-Za-z0-9]{40,}|secret_[A-Za-z0-9]{43})" + END),
    ("linear_key", "lin_api_ lin_oauth_", r"lin_(?:api|oauth)_[A-Za-z0-9]{32,}"),
    ("airtable_token", "pat", r"pat[A-Za-z0-9]{14}\.[0-9a-f]{64}" + END),
    ("figma_token", "figd_", r"figd_[\w-]{40,}"),
    ("postman_key", "pmak-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}"),
    ("hubspot_token", "pat-na pat-eu", r"pat-(?:na|eu)\d-" + UUID),
    ("contentful_token", "cfpat-", r"CFPAT-[\w-]{43}"),
    ("adobe_secret", "p8e-", r"p8e-[A-Za-z0-9_-]{32}" + END),
    ("readme_key", "rdme_", r"rdme_[a-z0-9]{70}"),
    ("grafana_token", "glsa_ glc_", r"(?:glsa_[A-Za-z0-9]{32}_[0-9A-Fa-f]{8}|glc_[A-Za-z0-9+/]{32,}={0,3})"),
    ("grafana_token", "eyjrijoi", r"eyJrIjoi[A-Za-z0-9+/]{40,}={0,3}"),
    ("sentry_token", "sntrys_ sntryu_", r"sntry[su]_[\w+/=]{40,}"),
    ("newrelic_key", "nrak- nrii-", r"NR(?:AK-[A-Z0-9]{27}|II-[\w-]{32})" + END),
    ("dynatrace_token", "dt0", r"dt0[a-z]\d\d\.[A-Z0-9]{24}\.[A-Z0-9]{64}"),
    ("posthog_key", "phx_", r"phx_[A-Za-z0-9]{40,}"),
    ("mapbox_token", "sk.eyj", r"sk\.eyJ[\w-]{20,}\.[\w-]{16,}"),
    ("maxmind_key", "_mmk", r"[A-Za-z0-9]{6}_[A-Za-z0-9]{29}_mmk" + END),
    # keys and signed tokens without a maker
    ("age_key", "age-secret-key-1", r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
    (
        "jwt",
        "eyj",
        rf"{JWT_HEAD}\.(?:eyJ[\w-]{{10,{LONGEST_PART}}}+\.[\w-]{{10,}}|(?:[\w-]{{0,{LONGEST_PART}}}+\.){{2,3}}[\w-]{{10,}})",
    ),
]
LEADS = {"azure_secret": (3,), "terraform_token": (14,), "maxmind_key": (36,), "mailchimp_key": (32,), "telegram_token": (10, 9, 8)}


def vendor_rules() -> Iterator[tuple[str, Rule]]:
    """A literal, and the rule to try where it stands."""
    for kind, literals, form in FORMS:
        pattern, leads = re.compile(BEGIN + form.replace(",}", f",{LONGEST}}}")), LEADS.get(kind, (0,))
        rest = re.compile(f"{ALPHABET.findall(form)[-1]}*+")
        for literal in literals.split(" "):
            yield literal, _rule(kind, pattern, rest, leads)


def _rule(kind: str, pattern: re.Pattern[str], rest: re.Pattern[str], leads: tuple[int, ...]) -> Rule:
    """`rest`: what the key ends with goes on until its alphabet ends, so that no limit and no longer form cuts a key."""
    group = "secret" if "secret" in pattern.groupindex else 0

    def rule(text: str, position: int) -> Iterator[Found]:
        for lead in leads:
            match = pattern.match(text, position - lead) if position >= lead else None
            if match and not is_marked(match[group]):
                more = rest.match(text, match.end(group))
                yield Found(kind, match.start(group), more.end() if more else match.end(group))
                return

    return rule
