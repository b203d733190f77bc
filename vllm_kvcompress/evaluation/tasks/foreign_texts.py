"""German, French, Spanish and Chinese: sentences, questions, and the training styles.

See `instructions` for the format of styles.
"""

# Sentences and questions in other languages.
FOREIGN: dict[str, tuple[str, ...]] = {
    "de": (
        "Der Bericht über {place} wurde {year} von {person} geschrieben.",
        "Die alte Brücke am Fluss ist seit {num} Jahren gesperrt.",
        "{name} fragte, ob die Firma {org} das Haus verkauft habe.",
        "Nach Angaben der Stadt kostet die neue Schule {num} Millionen Euro.",
        "Im Sommer fahren viele Familien mit dem Zug nach {place}.",
        "Der Mieter muss den Vertrag mit einer Frist von {num} Tagen kündigen.",
        "Das Museum zeigt Bilder, die lange als verloren galten.",
        "Eine Antwort auf diese Frage gibt der Text im dritten Absatz nicht.",
        "{person} arbeitet seit {year} als Ärztin in {place}.",
    ),
    "fr": (
        "Le rapport sur {place} a été publié en {year} par {person}.",
        "Le vieux pont au bord de la rivière est fermé depuis {num} ans.",
        "{name} a demandé si la société {org} avait vendu la maison.",
        "Selon la mairie, la nouvelle école coûtera {num} millions d'euros.",
        "En été, beaucoup de familles prennent le train pour {place}.",
        "Le locataire doit prévenir le propriétaire {num} jours avant son départ.",
        "Le musée présente des tableaux que l'on croyait perdus.",
        "La question reste ouverte et personne n'a donné de réponse.",
        "{person} travaille comme médecin à {place} depuis {year}.",
    ),
    "es": (
        "El informe sobre {place} fue publicado en {year} por {person}.",
        "El viejo puente junto al río está cerrado desde hace {num} años.",
        "{name} preguntó si la empresa {org} había vendido la casa.",
        "Según el ayuntamiento, la nueva escuela costará {num} millones de euros.",
        "En verano muchas familias viajan en tren a {place}.",
        "El inquilino debe avisar al dueño con {num} días de antelación.",
        "El museo muestra cuadros que se creían perdidos.",
        "La pregunta sigue abierta y nadie dio una respuesta.",
        "{person} trabaja como médica en {place} desde {year}.",
    ),
    "zh": (
        "{year}年，{org}公司在{place}开设了一家新工厂。",
        "河边的老桥已经关闭了{num}年。",
        "{name}问他的朋友为什么要卖掉那座房子。",
        "据市政府介绍，新学校将花费{num}万元。",
        "夏天，许多家庭坐火车去海边度假。",
        "承租人应当提前{num}天通知出租人。",
        "博物馆展出了一批失传已久的画。",
        "会议讨论了报告中的几个问题，但没有得出答案。",
        "{person}从{year}年起在医院工作。",
    ),
    "de_question": (
        "Wann wurde die alte Brücke gesperrt?",
        "Wer hat den Bericht über {place} geschrieben?",
        "Wie viel kostet die neue Schule?",
        "Warum hat {name} das Haus verkauft?",
        "In welcher Stadt arbeitet {person}?",
        "Was sagte {name} zu {org}?",
    ),
    "fr_question": (
        "Quand le vieux pont a-t-il été fermé ?",
        "Qui a écrit le rapport sur {place} ?",
        "Combien coûte la nouvelle école ?",
        "Pourquoi {name} a-t-il vendu la maison ?",
        "Dans quelle ville travaille {person} ?",
        "Qu'a dit {name} à propos de {org} ?",
    ),
    "es_question": (
        "¿Cuándo se cerró el viejo puente?",
        "¿Quién escribió el informe sobre {place}?",
        "¿Cuánto cuesta la nueva escuela?",
        "¿Por qué vendió {name} la casa?",
        "¿En qué ciudad trabaja {person}?",
        "¿Qué dijo {name} sobre {org}?",
    ),
    "zh_question": (
        "老桥是什么时候关闭的？",
        "谁写了关于{place}的报告？",
        "新学校要花多少钱？",
        "{name}为什么要卖房子？",
        "{person}在哪个城市工作？",
        "{org}公司什么时候成立的？",
    ),
}

LOCALIZATION = """
# de-passages
{Beantworte die Frage {anhand der folgenden Texte|mit Hilfe des Textes}.|Lies den Text und \
beantworte die Frage.|Im Folgenden steht ein Dokument und danach eine Frage.}
[de]
Frage: {de_asked}
Antwort:
# de-plain
[de]
{de_asked} {Antworte kurz.|Steht das im Text?|}
# de-imperative
[any]
{Bitte |}{finde|suche|nenne|gib mir|zitiere|wo steht|wie lautet} {das Datum, an dem {who} \
ankam|den \
Namen des Mieters|die Nummer der Klausel|den Preis|den Satz über {place}} {im Text|aus dem \
Dokument|}.
# de-find
[any]
{An welcher Stelle steht, dass {who} in {place} war?|Welche Nummer hat der Abschnitt über den \
Vertrag?|Wer ist der Eigentümer?|Wann beginnt die Sitzung?|Wie hoch ist die Miete?|Wo wohnt {who}?}
# fr-passages
{Réponds à la question {à l'aide des textes ci-dessous|d'après le document}.|Lis le texte puis \
réponds à la question.|Voici des passages et une question.}
[fr]
Question : {fr_asked}
Réponse :
# fr-plain
[fr]
{fr_asked} {Réponds en un mot.|Est-ce dans le texte ?|}
# fr-imperative
[any]
{Trouve|Cherche|Indique|Donne-moi|Cite|Quel est} {la date d'arrivée de {who}|le nom du \
locataire|le numéro de la clause|le prix|la phrase sur {place}} {dans le texte|du document|}.
# fr-find
[any]
{Dans quel paragraphe parle-t-on de {who} ?|Qui est le propriétaire ?|Quand commence la réunion ?|\
Quel est le numéro de la clause sur le loyer ?|Où habite {who} ?|Combien coûte le loyer ?}
# es-passages
{Responde a la pregunta {con los textos siguientes|según el documento}.|Lee el texto y responde a \
la pregunta.|Aquí hay unos textos y una pregunta.}
[es]
Pregunta: {es_asked}
Respuesta:
# es-plain
[es]
{es_asked} {Responde brevemente.|¿Está en el texto?|}
# es-imperative
[any]
{Busca|Encuentra|Indica|Dame|Cita|Cuál es} {la fecha en que llegó {who}|el nombre del \
inquilino|el número de la cláusula|el precio|la frase sobre {place}} {en el texto|del documento|}.
# es-find
[any]
{¿En qué párrafo se habla de {who}?|¿Quién es el dueño?|¿Cuándo empieza la reunión?|¿Qué número \
tiene la cláusula del alquiler?|¿Dónde vive {who}?|¿Cuánto cuesta el alquiler?}
# zh-passages
{请根据下面的文章回答问题。|阅读以下文本，然后回答问题，只给出答案。|以下是几段文字和一个问题。}
[zh]
问题：{zh_asked}
{回答：|答案：}
# zh-plain
[zh]
{问：|请问|}{zh_asked}{根据上文回答。|}
# zh-find
[any]
{文中哪一段提到了{place}？|请找出提到{who}的那句话。|合同第几条规定了租金？|{who}的电话号码是多少？\
|在文中查找会议的日期。|房东是谁？|会议几点开始？|{who}住在哪里？|租金是多少？}
"""

AGGREGATION = """
# de-summary
{Fasse den folgenden Text zusammen.|Schreibe eine kurze Zusammenfassung.|}
[de]
{Zusammenfassung:|Fasse das Dokument zusammen.}
# de-end
[any]
{Bitte |}{fasse alles in fünf Stichpunkten zusammen|übersetze den ganzen Text ins Deutsche|nenne \
alle Personen, die vorkommen|zähle alle Wörter|schreibe einen Aufsatz darüber|vergleiche die \
Texte|schreibe das Protokoll|setze die Geschichte fort|verbessere den Text}.
# de-whole-question
[any]
{Wie oft kommt das Wort "{noun}" vor?|Worum geht es im Text?|Was sind die Hauptthemen?|Wie viele \
verschiedene Personen kommen vor?|Wie ist die Stimmung insgesamt?|Was haben die Texte gemeinsam?}
# de-shots
[each]
Satz: {de}
Stimmung: {positiv|negativ}
[/each]
Satz: {de}
Stimmung:
# fr-summary
{Résume le texte suivant.|Écris un bref résumé du document.|}
[fr]
{Résumé :|Fais un résumé du document.}
# fr-end
[any]
{Fais-en un résumé en cinq points|Traduis tout le texte en français|Dresse la liste de toutes les \
personnes citées|Compte tous les mots|Écris une dissertation à ce sujet|Compare les textes|Rédige \
le compte rendu|Continue l'histoire|Corrige le texte}.
# fr-whole-question
[any]
{Combien de fois le mot « {noun} » apparaît-il ?|De quoi parle ce texte ?|Quels sont les thèmes \
principaux ?|Combien y a-t-il de personnes différentes ?|Quel est le ton général ?}
# fr-shots
[each]
Phrase : {fr}
Sentiment : {positif|négatif}
[/each]
Phrase : {fr}
Sentiment :
# es-summary
{Resume el texto siguiente.|Escribe un resumen breve del documento.|}
[es]
{Resumen:|Haz un resumen del documento.}
# es-end
[any]
{Haz un resumen en cinco puntos|Traduce todo el texto al español|Enumera todas las personas que se \
nombran|Cuenta todas las palabras|Escribe un ensayo sobre esto|Compara los textos|Redacta el \
acta|Continúa la historia|Corrige el texto}.
# es-whole-question
[any]
{¿Cuántas veces aparece la palabra "{noun}"?|¿De qué trata el texto?|¿Cuáles son los temas \
principales?|¿Cuántas personas distintas hay?|¿Cuál es el tono general?}
# es-shots
[each]
Frase: {es}
Sentimiento: {positivo|negativo}
[/each]
Frase: {es}
Sentimiento:
# zh-summary
{请总结以下文章。|为下面的报告写一段摘要。|}
[zh]
{摘要：|总结：|请总结上面的内容。}
# zh-end
[any]
{请把全文翻译成中文。|用三句话概括全文。|列出文中出现的所有人物。|统计“{noun}”一词出现的次数。|\
比较这些文章的异同。|写一篇文章。|写会议纪要。|续写这个故事。|修改全文的错误。}
# zh-whole-question
[any]
{这篇文章的主题是什么？|一共有多少个不同的人？|“{noun}”出现了几次？|全文的主要观点有哪些？|整体语气如何？}
# zh-shots
[each]
句子：{zh}
情感：{正面|负面}
[/each]
句子：{zh}
情感：
"""
